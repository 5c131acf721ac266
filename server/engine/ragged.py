"""Attention of packed rows of different lengths, each to itself and to its own delta's prefix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.ops.adapters import opening
from deltas.ops.native import ROW_FIELDS, Kernels
from deltas.patches import KVPrefix

SITE = "deltaserve_site"  # the attribute of an encoder's attention modules that names their KV site

_Prefixed = tuple[int, slice, tuple[Tensor, Tensor] | None]
"""A row's number, its tokens, and the keys and values before its own at the layer that is being computed."""


class RaggedAttention:
    """Bidirectional attention of packed rows of ``lengths`` tokens; ``deltas`` bring prefixes by KV site.

    Where there are ``kernels``, one call of them serves all rows. Without them, rows of one length without a prefix go
    together, as a batch that needs no mask, and a row with a prefix goes alone: the prefix is its delta's and may have
    another length in every layer. ``entered`` ``[tokens, hidden]`` is what the attention that is being computed was
    given: the gates of prefixes read it too.
    """

    entered: Tensor | None = None

    def __init__(
        self,
        lengths: Rows[int],
        deltas: Rows[PackedDelta | None],
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        self._kernels, self._device = kernels, device
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

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` -> as ``q``, contiguous."""
        out = q.new_empty(q.shape)
        prefixes = [
            (row, tokens, self._prefix(delta.prefixes.get(getattr(module, SITE)), tokens))
            for row, tokens, delta in self._prefixed
        ]
        if self._kernels is None:
            self._by_torch(q, k, v, scale, prefixes, out)
            return out
        table = self._table.copy() if prefixes else self._table
        for row, _, prefix in prefixes:
            if prefix is not None:
                keys, values = prefix
                table[row, 2:] = keys.data_ptr(), values.data_ptr(), len(keys)
        self._kernels.ragged_attention(table, q, k, v, scale, out)
        return out

    def _by_torch(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, prefixes: Rows[_Prefixed], out: Tensor
    ) -> None:
        for start, stop in self._single:
            rows = slice(start, stop)
            out[rows] = _attend(q[rows], k[rows], v[rows], scale)
        for length, index in self._same:
            shape = (len(index) // length, length, *q.shape[1:])
            queries, keys, values = (t[index].view(shape).transpose(1, 2) for t in (q, k, v))
            found = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
            out[index] = found.transpose(1, 2).flatten(0, 1)
        for _, tokens, prefix in prefixes:
            keys, values = k[tokens], v[tokens]
            if prefix is not None:
                keys, values = torch.cat([prefix[0], keys]), torch.cat([prefix[1], values])
            out[tokens] = _attend(q[tokens], keys, values, scale)

    def _prefix(self, prefix: KVPrefix | None, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[n, kv_heads, head_dim]``, contiguous, as the row of these tokens takes them."""
        if prefix is None:
            return None
        keys, values = prefix.keys.contiguous(), prefix.values.contiguous()
        if prefix.gate is None:
            return keys, values
        if self.entered is None:
            raise RuntimeError(f"{prefix.site}: what its attention was given is not known")
        tokens = self.entered[rows].to(prefix.gate.weight.dtype)
        opened = opening(prefix.gate, tokens).to(keys.dtype)
        return keys * opened[0], values * opened[-1]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One row: ``[queries, heads, head_dim]``."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
