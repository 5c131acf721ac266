"""Keys and values in pages: a slot is a table of pages, given out as its row grows.

Rows pay for the tokens that they hold and not for the longest row there may be, and rows that begin alike share pages
(:mod:`server.engine.pages`). Which rows may share is the scheduler's business, as with slots: the key is the tenant, the
delta's digest and the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltas.ops.rows import PagedKernels, RowKernels
from deltas.sites import BackboneSpec
from server.engine.pages import Pages
from server.engine.plain_attention import decode

PAGE = 32
"""Tokens of a page."""


class PagedKV:
    """``tokens`` of keys and values, ``[pages, layers, 2, kv_heads, PAGE, head_dim]``, for ``slots`` slots.

    See :class:`server.engine.kv.KV`. What rows hold together must stay within ``tokens``; each slot may have a page
    that is not full besides. Prefixes are put in place by :meth:`commit`, when what left slots has been given back.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        slots: int,
        capacity: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        count = -(-tokens // PAGE) + slots
        shape = (count, spec.layers, 2, spec.kv_heads, PAGE, spec.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [self.data[:, layer, 0] for layer in range(spec.layers)]
        self.values = [self.data[:, layer, 1] for layer in range(spec.layers)]
        self.pages = Pages(count, PAGE, slots)
        self._known = torch.zeros((slots, -(-capacity // PAGE)), dtype=torch.int32)
        self.table = self._known.to(device)  # int32 [slots, pages of a slot]: what the kernels read
        self._noted: list[tuple[int, int, int]] = []
        self._prefixes: dict[int, Tensor] = {}  # by slot, not yet in place
        self._changed: set[int] = set()

    @property
    def device(self) -> torch.device:
        return self.data.device

    def put_prefix(self, slot: int, prefix: Tensor) -> None:
        self._prefixes[slot] = prefix

    def read_prefix(self, slot: int, length: int) -> Tensor:
        held = self.data[self._indices(slot, 0, length)]  # [pages, layers, 2, kv_heads, PAGE, head_dim]
        joined = held.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        return joined[:, :, :, :length].clone()

    def copy(self, source: int, slot: int, length: int) -> None:
        self._prefixes.pop(slot, None)
        self.pages.cut(slot, 0)
        rest = self.pages.share(source, slot, length)
        if rest is not None:
            self.data[rest[1]] = self.data[rest[0]]
        self._changed.add(slot)

    def note(self, slot: int, start: int, end: int) -> None:
        self._noted.append((slot, start, end))

    def commit(self) -> None:
        for slot, _, end in self._noted:
            self.pages.cut(slot, end)
        for slot, start, end in self._noted:
            prefix = self._prefixes.pop(slot, None)
            before = len(self.pages.of[slot])
            copies = self.pages.own(slot, 0 if prefix is not None else start, end)
            for old, new in copies:
                self.data[new] = self.data[old]
            if prefix is not None:
                self._place(slot, prefix)
            if copies or len(self.pages.of[slot]) != before:
                self._changed.add(slot)
        self._noted.clear()
        if self._changed:
            for slot in self._changed:
                held = self.pages.of[slot]
                self._known[slot, : len(held)] = torch.tensor(held, dtype=torch.int32)
            self._changed.clear()
            self.table.copy_(self._known)

    def empty(self, slot: int) -> None:
        self._prefixes.pop(slot, None)
        self.pages.cut(slot, 0)

    def write(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, kernels: RowKernels | None
    ) -> None:
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(kernels, PagedKernels):
            kernels.write_pages(k, v, keys, values, slots, positions, self.table)
            return
        pages, within = self.table[slots, positions // PAGE].long(), positions % PAGE
        keys[pages, :, within] = k
        values[pages, :, within] = v

    def row(self, layer: int, slot: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        indices, skipped = self._indices(slot, first, end), first % PAGE

        def joined(cache: Tensor) -> Tensor:
            return cache[indices].transpose(0, 1).flatten(1, 2)[:, skipped : skipped + end - first]

        return joined(self.keys[layer]), joined(self.values[layer])

    def decode(
        self,
        layer: int,
        q: Tensor,
        slots: Tensor,
        firsts: Tensor | None,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        kernels: RowKernels | None,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> None:
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(kernels, PagedKernels):
            added = None if bias is None else bias.transpose(0, 1)
            kernels.attend_pages(
                q, keys, values, slots, lengths, scale, out, self.table, firsts, softcap, added
            )
            return
        ends = lengths if firsts is None else firsts + lengths
        pages = self.table[slots, : -(-int(ends.max()) // PAGE)].long()
        k, v = (cache[pages].transpose(1, 2).flatten(2, 3) for cache in (keys, values))
        rows = torch.arange(len(slots), device=q.device)
        out.copy_(decode(q, k, v, rows, firsts, lengths, scale, softcap, bias))

    def _place(self, slot: int, prefix: Tensor) -> None:
        length = prefix.shape[3]
        for i, page in enumerate(self.pages.of[slot][: -(-length // PAGE)]):
            part = prefix[:, :, :, i * PAGE : (i + 1) * PAGE]
            self.data[page, :, :, :, : part.shape[3]] = part

    def _indices(self, slot: int, first: int, end: int) -> Tensor:
        """The pages of the slot's tokens ``first .. end``, int32 on the device."""
        return self.table[slot, first // PAGE : -(-end // PAGE)]
