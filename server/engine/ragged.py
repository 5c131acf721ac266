"""Attention of packed rows of different lengths, each to itself and to its own delta's prefix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows
from typing import Any, Protocol

import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.ops.adapters import opening
from deltas.patches import KVPrefix
from server.engine.window import attend

SITE = "deltaserve_site"  # the attribute of an encoder's attention modules that names their KV site


class PairBias(Protocol):
    """What is added to the scores of a row's tokens, in the backbone's dtype."""

    def square(self, length: int) -> Tensor:
        """Of a row of so many tokens: ``[heads, length, length]``."""
        ...

    def behind(self, prefix: KVPrefix, length: int) -> Tensor:
        """Of a row whose tokens also attend to a prefix of n keys: ``[heads, length, n + length]``."""
        ...


class RaggedAttention:
    """Bidirectional attention of packed rows of ``lengths`` tokens; ``deltas`` bring prefixes by KV site.

    Rows of one length without a prefix go together, as a batch that needs no mask. A row with a prefix goes alone: the
    prefix is its delta's and may have another length in every layer. ``entered`` ``[tokens, hidden]`` is what the
    attention that is being computed was given: the gates of prefixes read it too. ``bias`` is by distance, if there is one.
    """

    entered: Tensor | None = None

    def __init__(
        self,
        lengths: Rows[int],
        deltas: Rows[PackedDelta | None],
        device: torch.device,
        bias: PairBias | None = None,
    ) -> None:
        self._bias = bias
        self._alone: list[tuple[int, int, PackedDelta]] = []
        starts: dict[int, list[int]] = defaultdict(list)
        at = 0
        for length, delta in zip(lengths, deltas, strict=True):
            if delta is not None and delta.prefixes:
                self._alone.append((at, at + length, delta))
            else:
                starts[length].append(at)
            at += length
        self._single = [(found[0], found[0] + n) for n, found in starts.items() if len(found) == 1]
        self._same = [
            (n, torch.cat([torch.arange(start, start + n) for start in found]).to(device))
            for n, found in starts.items()
            if len(found) > 1
        ]

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` -> as ``q``, contiguous.

        ``window``: see :func:`~server.engine.window.attend`. No backbone with windows takes prefixes.
        """
        out = q.new_empty(q.shape)
        for start, stop in self._single:
            rows = slice(start, stop)
            out[rows] = _attend(q[rows], k[rows], v[rows], scale, window, self._mask(stop - start))
        for length, index in self._same:
            shape = (len(index) // length, length, *q.shape[1:])
            queries, keys, values = (t[index].view(shape).transpose(1, 2) for t in (q, k, v))
            found = attend(queries, keys, values, scale, window, self._mask(length))
            out[index] = found.transpose(1, 2).flatten(0, 1)
        for start, stop, delta in self._alone:
            rows = slice(start, stop)
            keys, values = k[rows], v[rows]
            prefix = delta.prefixes.get(getattr(module, SITE))
            mask = self._mask(stop - start, prefix)
            if prefix is not None:
                before = self._prefix(prefix, rows)
                keys, values = torch.cat([before[0], keys]), torch.cat([before[1], values])
            out[rows] = _attend(q[rows], keys, values, scale, window, mask)
        return out

    def _mask(self, length: int, prefix: KVPrefix | None = None) -> Tensor | None:
        """``[1, heads, length, keys]``, None where nothing is added."""
        if self._bias is None:
            return None
        return (self._bias.square(length) if prefix is None else self._bias.behind(prefix, length))[None]

    def _prefix(self, prefix: KVPrefix, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, kv_heads, head_dim]`` as the row of these tokens takes them."""
        if prefix.gate is None:
            return prefix.keys, prefix.values
        if self.entered is None:
            raise RuntimeError(f"{prefix.site}: what its attention was given is not known")
        tokens = self.entered[rows].to(prefix.gate.weight.dtype)
        opened = opening(prefix.gate, tokens).to(prefix.keys.dtype)
        return prefix.keys * opened[0], prefix.values * opened[-1]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, bias: Tensor | None) -> Tensor:
    """One row: ``[queries, heads, head_dim]``."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return attend(q, k, v, scale, window, bias)[0].transpose(0, 1)
