"""Attention of packed rows that gradients flow through: each row to itself and to its own delta's prefix.

Rows of like length and one prefix make a *bucket*, padded to its longest row, so that torch's own attention serves it in
one call. A padded place holds the row's own last token, hence nothing of one row is ever multiplied with another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.patches import KVPrefix
from server.engine.ragged import SITE, PairBias

_WASTE = 1.35  # of padded places to real ones, beyond which a bucket is cut in two


class _Spread(torch.autograd.Function):
    """``x[index]``, where ``places`` is where each line of x is then, once: what padded places add to a gradient is zero,
    since nothing reads what they give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0][places], None, None


class _Collect(torch.autograd.Function):
    """The inverse: the lines ``places`` of ``padded``."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = padded.shape
        return padded[places]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        padded = grads[0].new_zeros(ctx.shape)
        padded[places] = grads[0]
        return padded, None


@dataclass(frozen=True, eq=False)
class _Bucket:
    """Rows that are padded together. ``tokens`` int64 ``[rows, longest]``: the packed token at each place; ``lengths``
    int64 ``[rows]``; ``even``: they are all as long."""

    delta: PackedDelta | None
    tokens: Tensor
    lengths: Tensor
    even: bool

    @property
    def longest(self) -> int:
        return self.tokens.shape[1]


class _Layout:
    """Packed tokens as buckets of padded rows, and back."""

    def __init__(self, buckets: Sequence[_Bucket]) -> None:
        self.buckets = buckets
        self._index = torch.cat([bucket.tokens.flatten() for bucket in buckets])
        real = torch.cat([_real(bucket) for bucket in buckets]).nonzero().squeeze(1)
        self._places = real[self._index[real].argsort()]
        self._as_it_is = len(self._index) == len(real) and bool((self._index == self._places).all())

    def spread(self, x: Tensor) -> list[Tensor]:
        """``[tokens, heads, head_dim]`` -> by bucket ``[rows, heads, longest, head_dim]``."""
        padded: Tensor = x if self._as_it_is else _Spread.apply(x, self._index, self._places)  # type: ignore[no-untyped-call]
        parts = torch.split(padded, [bucket.tokens.numel() for bucket in self.buckets])
        return [
            part.view(*bucket.tokens.shape, *x.shape[1:]).transpose(1, 2)
            for part, bucket in zip(parts, self.buckets, strict=True)
        ]

    def collect(self, found: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`spread`."""
        padded = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in found])
        if self._as_it_is:
            return padded
        packed: Tensor = _Collect.apply(padded, self._places)  # type: ignore[no-untyped-call]
        return packed


def _real(bucket: _Bucket) -> Tensor:
    """Whether a bucket's places hold a token of their own, bool ``[rows * longest]``."""
    at = torch.arange(bucket.longest, device=bucket.tokens.device)
    return (at < bucket.lengths[:, None]).flatten()


class PackedAttention:
    """One pass's self-attention of rows of ``lengths`` tokens; ``deltas`` bring prefixes by KV site.

    ``site_of`` names the KV site of what calls it, a layer's number; by default a module that knows its own. ``bias`` is
    by distance, if there is one. ``causal`` rows see what is before them, others everything of their row.
    """

    entered: Tensor | None = None

    def __init__(
        self,
        lengths: Sequence[int],
        deltas: Sequence[PackedDelta | None],
        device: torch.device,
        *,
        causal: bool,
        bias: PairBias | None = None,
        site_of: Callable[[Any], str] | None = None,
    ) -> None:
        self._causal, self._bias = causal, bias
        self._site_of = site_of or (lambda module: str(getattr(module, SITE)))
        self._layout = _Layout(_buckets(lengths, deltas, device))
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def __call__(
        self,
        where: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` -> as ``q``.

        ``window``: as :class:`~server.engine.kv.Attention` has it for causal rows, as :func:`~server.engine.window.attend`
        for others; ``softcap`` c turns every score s into c tanh(s / c).
        """
        site = self._site_of(where)
        layout = self._layout
        parts = zip(layout.buckets, layout.spread(q), layout.spread(k), layout.spread(v), strict=True)
        found = []
        for number, (bucket, queries, keys, values) in enumerate(parts):
            prefix, keys, values = _behind(bucket, site, keys, values)
            before = 0 if prefix is None else len(prefix.keys)
            narrow = window if window is not None and window < bucket.longest + before else None
            mask = self._mask(number, bucket, before, narrow)
            added = self._added(bucket, prefix)
            found.append(attend(queries, keys, values, scale, mask, added, softcap, causal=self._causal))
        return layout.collect(found)

    def _mask(self, number: int, bucket: _Bucket, before: int, window: int | None) -> Tensor | None:
        """What places see, bool, broadcastable to ``[rows, 1, longest, before + longest]``; None where plain (causal)
        attention is right: a padded place is behind all of its row's tokens, which do not see ahead."""
        plain = before == 0 and window is None and (self._causal or bucket.even)
        if plain or (not self._causal and window is None and bucket.even):
            return None
        key = (number, before, window)
        if key not in self._masks:
            self._masks[key] = self._visible(bucket, before, window)
        return self._masks[key]

    def _visible(self, bucket: _Bucket, before: int, window: int | None) -> Tensor:
        device = bucket.tokens.device
        queries = torch.arange(bucket.longest, device=device)[:, None] + before
        keys = torch.arange(bucket.longest + before, device=device)
        if self._causal:
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            return seen
        seen = keys < bucket.lengths[:, None, None, None] + before
        if window is not None:
            # a padded place would see nothing, and its softmax would be NaN; it may as well see itself
            near = (keys - queries).abs() < window
            seen = (seen & near) | (keys == queries)
        return seen

    def _added(self, bucket: _Bucket, prefix: KVPrefix | None) -> Tensor | None:
        """``[1, heads, longest, keys]``, None where nothing is added to the scores."""
        if self._bias is None:
            return None
        length = bucket.longest
        return (self._bias.square(length) if prefix is None else self._bias.behind(prefix, length))[None]


class PackedCross:
    """Cross-attention: row i's ``counts[i]`` decoder tokens see its ``lengths[i]`` encoder tokens.

    ``keys_of`` makes a layer's keys and values of the encoder's output; ``site_of`` names a layer's KV site.
    """

    def __init__(
        self,
        counts: Sequence[int],
        lengths: Sequence[int],
        deltas: Sequence[PackedDelta | None],
        device: torch.device,
        *,
        keys_of: Callable[[int], tuple[Tensor, Tensor]],
        site_of: Callable[[int], str],
    ) -> None:
        self._keys_of, self._site_of = keys_of, site_of
        own, sources = [], []
        starts, source_starts = _starts(counts), _starts(lengths)
        for rows in _by_prefix(deltas):
            delta = deltas[rows[0]]
            own.append(_bucket([(starts[row], counts[row]) for row in rows], delta, device))
            sources.append(_bucket([(source_starts[row], lengths[row]) for row in rows], delta, device))
        self._own, self._sources = _Layout(own), _Layout(sources)

    def __call__(self, layer: int, q: Tensor, scale: float, /) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]`` -> the same shape."""
        k, v = self._keys_of(layer)
        site, sources = self._site_of(layer), self._sources
        parts = zip(sources.buckets, self._own.spread(q), sources.spread(k), sources.spread(v), strict=True)
        found = []
        for bucket, queries, keys, values in parts:
            prefix, keys, values = _behind(bucket, site, keys, values)
            before = 0 if prefix is None else len(prefix.keys)
            mask = None
            if not bucket.even:
                places = torch.arange(bucket.longest + before, device=q.device)
                mask = places < bucket.lengths[:, None, None, None] + before
            found.append(attend(queries, keys, values, scale, mask, None, None, causal=False))
        return self._own.collect(found)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    *,
    causal: bool,
) -> Tensor:
    """Attention of ``q`` ``[rows, heads, tokens, head_dim]``, ``k``, ``v`` ``[rows, kv_heads, keys, head_dim]``.

    Gives the shape of ``q``. ``mask`` is True where a token sees a key; without one, ``causal`` tokens see as many keys as
    themselves. ``bias`` is added to the scores.
    """
    grouped = q.shape[1] != k.shape[1]
    if mask is None and causal and (bias is not None or softcap is not None):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if softcap is not None:
        return _softened(q, k, v, scale, mask, softcap)
    if bias is not None and mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask if bias is None else bias,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=grouped,
    )


def _softened(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float) -> Tensor:
    """Attention whose scores are capped, which torch's own attention cannot do."""
    rows, heads, tokens, width = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, tokens, width)
    scores = torch.matmul(grouped, k[:, :, None].transpose(3, 4)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        hidden = ~mask if mask.dim() == 2 else ~mask[:, :, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    attended = torch.matmul(scores.softmax(-1).to(q.dtype), v[:, :, None])
    return attended.reshape(rows, heads, tokens, width)


def _behind(
    bucket: _Bucket, site: str, keys: Tensor, values: Tensor
) -> tuple[KVPrefix | None, Tensor, Tensor]:
    """The bucket's prefix at a site, if it has one, and the keys and values of its rows behind it."""
    prefix = None if bucket.delta is None else bucket.delta.prefixes.get(site)
    if prefix is None:
        return None, keys, values
    before, given = (
        part.transpose(0, 1).expand(len(keys), -1, -1, -1) for part in (prefix.keys, prefix.values)
    )
    return prefix, torch.cat([before, keys], dim=2), torch.cat([given, values], dim=2)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def _by_prefix(deltas: Sequence[PackedDelta | None]) -> list[list[int]]:
    """Rows that may share a bucket, by their numbers: those without prefixes, and those of each delta with some."""
    found: dict[int | None, list[int]] = {}
    for row, delta in enumerate(deltas):
        found.setdefault(id(delta) if delta is not None and delta.prefixes else None, []).append(row)
    return list(found.values())


def _buckets(
    lengths: Sequence[int], deltas: Sequence[PackedDelta | None], device: torch.device
) -> list[_Bucket]:
    starts = _starts(lengths)
    found = []
    for rows in _by_prefix(deltas):
        delta = deltas[rows[0]]
        for part in _alike(sorted(rows, key=lambda row: lengths[row]), lengths):
            found.append(_bucket([(starts[row], lengths[row]) for row in part], delta, device))
    return found


def _alike(rows: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows in the order of their lengths, cut where padding all to the longest would waste too much."""
    if lengths[rows[-1]] * len(rows) <= _WASTE * sum(lengths[row] for row in rows):
        return [rows]
    middle = max(1, sum(lengths[row] <= lengths[rows[-1]] // 2 for row in rows))
    if middle == len(rows):
        return [rows]
    return [*_alike(rows[:middle], lengths), *_alike(rows[middle:], lengths)]


def _bucket(rows: list[tuple[int, int]], delta: PackedDelta | None, device: torch.device) -> _Bucket:
    """Of rows by their first packed token and their length."""
    longest = max(length for _, length in rows)
    firsts = torch.tensor([first for first, _ in rows])[:, None]
    lengths = torch.tensor([length for _, length in rows])
    tokens = firsts + torch.minimum(torch.arange(longest), lengths[:, None] - 1)
    return _Bucket(delta, tokens.to(device), lengths.to(device), even=bool((lengths == longest).all()))
