"""Keys and values by slot: one row of the batch owns one slot of fixed capacity, and attends to it in place.

On a CPU the memory is mapped but not touched until it is written, so a large capacity costs nothing until rows are
long; a slot that held a long row gives its pages back.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from deltas.ops.rows import RowKernels
from deltas.sites import BackboneSpec
from server.engine.plain_attention import chunk, decode

RETURN_PAGES_ABOVE = 1024  # tokens: below this, keeping the pages costs less than faulting them in again


class KV(Protocol):
    """Where rows keep keys and values: slot by slot, ``capacity`` tokens in each at most.

    A pass says first what it will write (:meth:`note`, for every row, then :meth:`commit`), then writes and reads layer
    by layer.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def put_prefix(self, slot: int, prefix: Tensor) -> None:
        """A delta's keys and values ``[layers, 2, kv_heads, n, head_dim]`` are the first of a slot."""
        ...

    def read_prefix(self, slot: int, length: int) -> Tensor:
        """A copy of the first ``length`` tokens of a slot, ``[layers, 2, kv_heads, length, head_dim]``."""
        ...

    def copy(self, source: int, slot: int, length: int) -> None:
        """The first ``length`` tokens of another slot."""
        ...

    def note(self, slot: int, start: int, end: int) -> None:
        """Tokens ``start .. end`` of a slot are about to be written; what it held from ``end`` on is lost."""
        ...

    def commit(self) -> None:
        """There is memory for what was noted."""
        ...

    def empty(self, slot: int) -> None:
        """Gives the slot's memory back, if it is much; what was written there is lost."""
        ...

    def write(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, kernels: RowKernels | None
    ) -> None:
        """Puts tokens' ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` at ``slots``, ``positions``, int64 ``[tokens]``."""
        ...

    def row(self, layer: int, slot: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """A slot's keys and values of the tokens ``first .. end``, ``[kv_heads, end - first, head_dim]``."""
        ...

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
        """Attention of one token a row to its slot; :func:`server.engine.plain_attention.decode` has the shapes."""
        ...


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

    @property
    def device(self) -> torch.device:
        return self.data.device

    def put_prefix(self, slot: int, prefix: Tensor) -> None:
        self.data[slot, :, :, :, : prefix.shape[3]].copy_(prefix)

    def write(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, kernels: RowKernels | None
    ) -> None:
        if kernels is not None:
            kernels.kv_write(k, v, self.keys[layer], self.values[layer], slots, positions)
            return
        self.keys[layer][slots, :, positions] = k
        self.values[layer][slots, :, positions] = v

    def row(self, layer: int, slot: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][slot][:, first:end], self.values[layer][slot][:, first:end]

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
        if kernels is None:
            out.copy_(decode(q, keys, values, slots, firsts, lengths, scale, softcap, bias))
            return
        added = None if bias is None else bias.transpose(0, 1)
        kernels.decode_attention(q, keys, values, slots, lengths, scale, out, firsts, softcap, added)

    def read_prefix(self, slot: int, length: int) -> Tensor:
        return self.data[slot, :, :, :, :length].clone()

    def copy(self, source: int, slot: int, length: int) -> None:
        self.note(slot, 0, length)
        self.data[slot, :, :, :, :length] = self.data[source, :, :, :, :length]

    def note(self, slot: int, start: int, end: int) -> None:
        del start
        self._written[slot] = max(self._written[slot], end)

    def commit(self) -> None:
        """Slots have their memory."""

    def empty(self, slot: int) -> None:
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
        kv: KV,
        kernels: RowKernels | None,
        slots: list[int],
        starts: list[int],
        counts: list[int],
        bias: ScoreBias | None = None,
    ) -> None:
        self.kv = kv
        self.kernels = kernels
        self._bias = bias
        self._added: dict[int, Tensor] = {}  # by first token
        self.rows = list(zip(slots, starts, counts, strict=True))
        for slot, start, count in self.rows:
            kv.note(slot, start, start + count)
        kv.commit()
        self._longest = max((start + count for _, start, count in self.rows), default=0)
        self._windows: dict[int, tuple[Tensor, Tensor]] = {}
        self.singles, self.chunks = singles_and_chunks(counts)

    @cached_property
    def token_slots(self) -> Tensor:
        return torch.tensor([s for s, _, c in self.rows for _ in range(c)], device=self.kv.device)

    @cached_property
    def token_positions(self) -> Tensor:
        """The tokens' places in their slots."""
        places = [p for _, b, c in self.rows for p in range(b, b + c)]
        return torch.tensor(places, device=self.kv.device)

    @cached_property
    def token_lengths(self) -> Tensor:
        """How many keys each token sees where there is no window."""
        return self.token_positions + 1

    @classmethod
    def decoding(cls, kv: KV, kernels: RowKernels | None, slots: Tensor, positions: Tensor) -> Attention:
        """One token a row at ``positions`` of ``slots``, int64 ``[rows]`` on the device; the caller has noted them.

        Nothing of it depends on what the tensors say, so a CUDA graph may hold the pass.
        """
        step = cls(kv, kernels, [], [], [])
        step.token_slots, step.token_positions = slots, positions
        step.singles, step._longest = [(0, len(slots))], kv.capacity
        return step

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
        self.kv.write(layer, k, v, self.token_slots, self.token_positions, self.kernels)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        first_keys, visible = self._seen(window)
        for first, count in self.singles:
            part = slice(first, first + count)
            slots, lengths = self.token_slots[part], visible[part]
            firsts = None if first_keys is None else first_keys[part]
            bias = self._bias_of(part, self._longest)
            self.kv.decode(
                layer, q[part], slots, firsts, lengths, scale, out[part], self.kernels, softcap, bias
            )
        for i, first in self.chunks:
            slot, start, count = self.rows[i]
            part = slice(first, first + count)
            bias = self._bias_of(part, start + count)
            begin = 0 if window is None else max(0, start + 1 - window)
            keys, values = self.kv.row(layer, slot, begin, start + count)
            out[part] = chunk(q[part], keys, values, start, count, scale, window, softcap, bias)
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
