"""Keys and values by slot: one row of the batch owns one slot of fixed capacity, and attends to it in place.

On a CPU the memory is mapped but not touched until it is written, so a large capacity costs nothing until rows are
long; a slot that held a long row gives its pages back.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.ops.native import Kernels
from deltas.sites import BackboneSpec

RETURN_PAGES_ABOVE = 1024  # tokens: below this, keeping the pages costs less than faulting them in again


class SlotKV:
    """``slots`` x ``capacity`` tokens of keys and values, ``[slots, layers, 2, kv_heads, capacity, head_dim]``."""

    def __init__(
        self, spec: BackboneSpec, slots: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, spec.layers, 2, spec.kv_heads, capacity, spec.head_dim)
        self.capacity = capacity
        self._written = [0] * slots  # the most tokens since the slot was emptied
        self._map: mmap.mmap | None = None
        self._slot_bytes = token_bytes(spec, dtype) * capacity
        if device.type == "cpu":
            self._slot_bytes = -(-self._slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            self._map = mmap.mmap(-1, self._slot_bytes * slots)
            flat = torch.frombuffer(self._map, dtype=dtype)
            inner = torch.empty(shape[1:], device="meta").stride()
            self.data = flat.as_strided(shape, (self._slot_bytes // dtype.itemsize, *inner))
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [self.data[:, layer, 0] for layer in range(spec.layers)]
        self.values = [self.data[:, layer, 1] for layer in range(spec.layers)]

    def put_prefix(self, slot: int, prefix: Tensor) -> None:
        """Copies a delta's keys and values ``[layers, 2, kv_heads, n, head_dim]`` to the start of a slot."""
        self.data[slot, :, :, :, : prefix.shape[3]].copy_(prefix)

    def write(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, kernels: Kernels | None
    ) -> None:
        """Puts tokens' ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` at ``slots``, ``positions``, int64 ``[tokens]``."""
        if kernels is not None:
            kernels.kv_write(k, v, self.keys[layer], self.values[layer], slots, positions)
            return
        self.keys[layer][slots, :, positions] = k
        self.values[layer][slots, :, positions] = v

    def read_prefix(self, slot: int, length: int) -> Tensor:
        """A copy of the first ``length`` tokens of a slot, ``[layers, 2, kv_heads, length, head_dim]``."""
        return self.data[slot, :, :, :, :length].clone()

    def copy(self, source: int, slot: int, length: int) -> None:
        """The first ``length`` tokens of another slot."""
        self.note(slot, length)
        self.data[slot, :, :, :, :length] = self.data[source, :, :, :, :length]

    def note(self, slot: int, length: int) -> None:
        """The first ``length`` tokens of a slot are being written."""
        self._written[slot] = max(self._written[slot], length)

    def empty(self, slot: int) -> None:
        """Gives the slot's memory back, if it is much; what was written there is lost."""
        if self._map is not None and self._written[slot] > RETURN_PAGES_ABOVE:
            self._map.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)
            self._written[slot] = 0


def token_bytes(spec: BackboneSpec, dtype: torch.dtype) -> int:
    """What one token's keys and values take in all layers."""
    return spec.layers * 2 * spec.kv_heads * spec.head_dim * dtype.itemsize


class ScoreBias(Protocol):
    """What is added to attention's scores."""

    def __call__(self, tokens: slice, keys: int) -> Tensor:
        """For these packed tokens and the first ``keys`` keys of their rows' slots: ``[heads, tokens, keys]``."""
        ...


class Attention:
    """One forward's attention over slots, for packed tokens: decode rows first, then prefill chunks.

    Rows are given in packed order. ``starts[i]`` is how many keys row i's slot held before this forward (prefix
    included), ``counts[i]`` how many tokens it adds now. The tensors are on the KV's device.
    """

    def __init__(
        self,
        kv: SlotKV,
        kernels: Kernels | None,
        slots: list[int],
        starts: list[int],
        counts: list[int],
        bias: ScoreBias | None = None,
    ) -> None:
        self.kv = kv
        self.kernels = kernels
        self._bias = bias
        self._added: dict[int, Tensor] = {}  # by first token
        device = kv.data.device
        self.rows = list(zip(slots, starts, counts, strict=True))
        for slot, start, count in self.rows:
            kv.note(slot, start + count)
        self.token_slots = torch.tensor([s for s, _, c in self.rows for _ in range(c)], device=device)
        self.token_positions = torch.tensor(
            [p for _, b, c in self.rows for p in range(b, b + c)], device=device
        )
        self.token_lengths = self.token_positions + 1
        self._longest = max((start + count for _, start, count in self.rows), default=0)
        self._windows: dict[int, tuple[Tensor, Tensor]] = {}
        self.singles, self.chunks = singles_and_chunks(counts)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` -> as ``q``, contiguous.

        ``window``: a token sees itself and as many tokens before it as make that number, its row's prefix among them.
        ``softcap`` c turns every score s into c tanh(s / c), before the softmax.
        """
        if self._bias is not None and (window is not None or softcap is not None):
            raise ValueError("a bias goes with neither a window nor capped scores")
        keys, values = self.kv.keys[layer], self.kv.values[layer]
        self.kv.write(layer, k, v, self.token_slots, self.token_positions, self.kernels)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        first_keys, visible = self._seen(window)
        for first, count in self.singles:
            part = slice(first, first + count)
            slots, lengths = self.token_slots[part], visible[part]
            firsts = None if first_keys is None else first_keys[part]
            bias = self._bias_of(part, self._longest)
            if self.kernels is not None:
                added = None if bias is None else bias.transpose(0, 1)
                self.kernels.decode_attention(
                    q[part], keys, values, slots, lengths, scale, out[part], firsts, softcap, added
                )
            else:
                out[part] = decode(q[part], keys, values, slots, firsts, lengths, scale, softcap, bias)
        for i, first in self.chunks:
            slot, start, count = self.rows[i]
            part = slice(first, first + count)
            bias = self._bias_of(part, start + count)
            out[part] = _chunk(q[part], keys[slot], values[slot], start, count, scale, window, softcap, bias)
        return out

    def _bias_of(self, part: slice, keys: int) -> Tensor | None:
        """Float32 ``[heads, tokens, keys]``, made once for all layers."""
        if self._bias is None:
            return None
        if part.start not in self._added:
            self._added[part.start] = self._bias(part, keys).float()
        return self._added[part.start]

    def _seen(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """By token: where the keys begin that it sees (None: at 0), and how many there are."""
        if window is None or window >= self._longest:
            return None, self.token_lengths
        if window not in self._windows:
            firsts = (self.token_lengths - window).clamp_(min=0)
            self._windows[window] = (firsts, self.token_lengths - firsts)
        return self._windows[window]


def singles_and_chunks(counts: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Runs of rows of one token as (first token, tokens), which share a call, and longer rows as (row, first token).

    Chunks of a prompt go row by row through torch's attention, which rounds as Hugging Face's does: the kernel is 12 %
    of a prefill faster, but turns near-ties in bfloat16 another way.
    """
    singles: list[tuple[int, int]] = []
    chunks: list[tuple[int, int]] = []
    token = 0
    for i, count in enumerate(counts):
        if count > 1:
            chunks.append((i, token))
        elif singles and sum(singles[-1]) == token:
            singles[-1] = (singles[-1][0], singles[-1][1] + 1)
        else:
            singles.append((token, 1))
        token += count
    return singles, chunks


def _chunk(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    count: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """Causal attention of ``count`` tokens of one row that follow ``start`` cached ones."""
    end = start + count
    first = 0 if window is None else max(0, start + 1 - window)
    keys, values = keys[:, first:end], values[:, first:end]
    masked = start > 0 or softcap is not None or bias is not None or (window is not None and window < end)
    mask = None
    if masked:
        mask = torch.ones(count, end - first, dtype=torch.bool, device=q.device).tril(start - first)
        if window is not None:
            mask = mask.triu(start - first + 1 - window)
    if softcap is not None and mask is not None:
        return _softened(q, keys, values, mask, scale, softcap)
    if bias is not None and mask is not None:
        mask = bias.masked_fill(~mask, float("-inf")).to(q.dtype)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask if mask is None or mask.dim() == 2 else mask[None],
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return attended[0].transpose(0, 1)


def _softened(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention whose scores are capped, which torch's own attention cannot do."""
    tokens, heads, width = q.shape
    grouped = q.transpose(0, 1).reshape(keys.shape[0], -1, tokens, width)
    scores = torch.matmul(grouped, keys[:, None].transpose(2, 3)).float() * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    attended = torch.matmul(scores.softmax(-1).to(q.dtype), values[:, None])
    return attended.reshape(heads, tokens, width).transpose(0, 1)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    firsts: Tensor | None,
    lengths: Tensor,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One token a row against its slot, in plain torch: gathered to the longest row and masked.

    ``bias`` ``[heads, rows, keys]`` is added to the scores.
    """
    rows, heads, width = q.shape
    kv_heads = keys.shape[1]
    ends = lengths if firsts is None else firsts + lengths
    longest = int(ends.max())
    k = keys[slots, :, :longest]
    v = values[slots, :, :longest]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, width)
    scores = torch.matmul(grouped, k.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores += bias[:, :, :longest].transpose(0, 1).reshape(rows, kv_heads, -1, longest)
    at = torch.arange(longest, device=q.device)
    hidden = at >= ends[:, None]
    if firsts is not None:
        hidden |= at < firsts[:, None]
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1).to(q.dtype)
    # a released slot may hold anything beyond the row's end; 0 * NaN would let it through
    v = v.masked_fill(hidden[:, None, :, None], 0)
    return torch.matmul(weights, v).reshape(rows, heads, width)
