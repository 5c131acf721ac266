"""Attention of packed rows of different lengths, each to itself and to its own delta's prefix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.ops.adapters import opening
from deltas.ops.native import ROW_FIELDS, Kernels
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


@dataclass(frozen=True)
class _Prefixed:
    """A row by its number, its tokens, and what is before its own keys at the layer that is being computed."""

    row: int
    tokens: slice
    prefix: KVPrefix | None


class RaggedAttention:
    """Bidirectional attention of packed rows of ``lengths`` tokens; ``deltas`` bring prefixes by KV site.

    Where there are ``kernels``, one call of them serves all rows, but with a bias. Without them, rows of one length without
    a prefix go together, as a batch that needs no mask, and a row with a prefix goes alone: the prefix is its delta's and
    may have another length in every layer. ``entered`` ``[tokens, hidden]`` is what the attention that is
    being computed was given: the gates of prefixes read it too. ``bias`` is by distance, if there is one.
    """

    entered: Tensor | None = None

    def __init__(
        self,
        lengths: Rows[int],
        deltas: Rows[PackedDelta | None],
        device: torch.device,
        *,
        kernels: Kernels | None = None,
        bias: PairBias | None = None,
    ) -> None:
        self._kernels, self._device, self._bias = kernels, device, bias
        self._table = np.zeros((len(lengths), len(ROW_FIELDS)), dtype=np.int64)
        self._prefixed: list[tuple[int, slice, PackedDelta]] = []  # the row's number, its tokens
        self._starts: dict[int, list[int]] = defaultdict(list)  # of the other rows, by length
        at = 0
        for row, (length, delta) in enumerate(zip(lengths, deltas, strict=True)):
            self._table[row, :2] = at, length
            if delta is not None and delta.prefixes:
                self._prefixed.append((row, slice(at, at + length), delta))
            else:
                self._starts[length].append(at)
            at += length
        self._longest = max(lengths, default=0)

    @cached_property
    def _single(self) -> list[tuple[int, int]]:
        return [(found[0], found[0] + n) for n, found in self._starts.items() if len(found) == 1]

    @cached_property
    def _same(self) -> list[tuple[int, Tensor]]:
        return [
            (n, torch.cat([torch.arange(start, start + n) for start in found]).to(self._device))
            for n, found in self._starts.items()
            if len(found) > 1
        ]

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` -> as ``q``, contiguous.

        ``window``: see :func:`~server.engine.window.attend`. No backbone with windows takes prefixes.
        """
        out = q.new_empty(q.shape)
        if window is not None and window >= self._longest:
            window = None
        prefixes = [
            _Prefixed(row, tokens, delta.prefixes.get(getattr(module, SITE)))
            for row, tokens, delta in self._prefixed
        ]
        if self._kernels is None or self._bias is not None:
            self._by_torch(q, k, v, scale, window, prefixes, out)
            return out
        opened = [(at.row, self._opened(at.prefix, at.tokens)) for at in prefixes if at.prefix is not None]
        table = self._table.copy() if opened else self._table
        for row, (keys, values) in opened:
            table[row, 2:] = keys.data_ptr(), values.data_ptr(), len(keys)
        self._kernels.ragged_attention(table, q, k, v, scale, out, window)
        return out

    def _by_torch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        prefixes: Rows[_Prefixed],
        out: Tensor,
    ) -> None:
        for start, stop in self._single:
            rows = slice(start, stop)
            out[rows] = _attend(q[rows], k[rows], v[rows], scale, window, self._added(stop - start))
        for length, index in self._same:
            shape = (len(index) // length, length, *q.shape[1:])
            queries, keys, values = (t[index].view(shape).transpose(1, 2) for t in (q, k, v))
            found = attend(queries, keys, values, scale, window, self._added(length))
            out[index] = found.transpose(1, 2).flatten(0, 1)
        for at in prefixes:
            keys, values = k[at.tokens], v[at.tokens]
            added = self._added(len(keys), at.prefix)
            if at.prefix is not None:
                before = self._opened(at.prefix, at.tokens)
                keys, values = torch.cat([before[0], keys]), torch.cat([before[1], values])
            out[at.tokens] = _attend(q[at.tokens], keys, values, scale, window, added)

    def _added(self, length: int, prefix: KVPrefix | None = None) -> Tensor | None:
        """``[1, heads, length, keys]``, None where nothing is added to the scores."""
        if self._bias is None:
            return None
        return (self._bias.square(length) if prefix is None else self._bias.behind(prefix, length))[None]

    def _opened(self, prefix: KVPrefix, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, kv_heads, head_dim]``, contiguous, as the row of these tokens takes them."""
        keys, values = prefix.keys.contiguous(), prefix.values.contiguous()
        if prefix.gate is None:
            return keys, values
        if self.entered is None:
            raise RuntimeError(f"{prefix.site}: what its attention was given is not known")
        tokens = self.entered[rows].to(prefix.gate.weight.dtype)
        opened = opening(prefix.gate, tokens).to(keys.dtype)
        return keys * opened[0], values * opened[-1]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, bias: Tensor | None) -> Tensor:
    """One row: ``[queries, heads, head_dim]``."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return attend(q, k, v, scale, window, bias)[0].transpose(0, 1)
