"""Decode steps as CUDA graphs: captured once for a number of rows and a rank, replayed with what the step is about.

A decode step is hundreds of small launches, which take longer to send than to run. A graph sends them at once, but it
holds addresses and sizes, so everything that changes from step to step is in static buffers: token ids, positions,
where in the KV each row writes, and the table of the deltas' units (:class:`deltas.ops.triton_plan.StaticPlan`). A step
is filled up to the next number of rows with rows that nobody reads, in the scratch slot; lines of the table that no
delta needs end at once.

Steps that no graph can hold go the usual way: see :meth:`DecodeGraphs.run`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from deltas.groups import SiteGroup
from deltas.ops import Ops
from deltas.ops.triton_plan import ALIGNED, RANK, Room, StaticPlan, Units
from server.engine.kv import KV, Attention

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
RANKS = (0, 16, 32, 64, 128, 256)  # 0: gains and shifts alone, or no delta at all
MOST = 64  # graphs that are kept


class Graph(Protocol):
    """Launches that are recorded once. :class:`CudaGraph` is the real one; tests replay by calling again."""

    def capture(self, body: Callable[[], Tensor]) -> Tensor:
        """Records ``body`` and returns its result, whose values each :meth:`replay` computes anew in place."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """A graph on the current CUDA device; all of one ``pool`` share memory, so only one may be in flight."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, body: Callable[[], Tensor]) -> Tensor:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels and makes workspaces, which a capture must not
            body()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph, pool=self._pool):
            return body()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graphs() -> Callable[[], Graph]:
    """A maker of graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


Body = Callable[[Attention, Tensor, Tensor, Plan | None], Tensor]
"""Attention, positions and token ids ``[rows]``, the deltas' plan for body and head -> logits ``[rows, vocab]``."""


@dataclass(frozen=True)
class DecodeStep:
    """One token a row: its id, its position, the row's slot and how many keys that held before; the rows' deltas."""

    ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    starts: Sequence[int]
    deltas: Sequence[PackedDelta | None]


@dataclass(frozen=True, eq=False)
class _Composition:
    """What the rows' deltas do in a decode step; ``units`` None where no graph can hold it."""

    deltas: list[PackedDelta | None]
    units: Units | None
    rank: int = 0
    reach: frozenset[int] = frozenset()


@dataclass(eq=False)
class _Captured:
    """One graph with its buffers. ``inputs`` int64 ``[4, rows]``: ids, positions, slots, places in the slots."""

    graph: Graph
    inputs: Tensor
    staged: Tensor
    plan: StaticPlan | None
    logits: Tensor | None = None
    loaded: _Composition | None = None


@dataclass(eq=False)
class DecodeGraphs:
    """The graphs of one runner, made as they are needed; the least recently used goes when there are ``most``."""

    ops: Ops
    kv: KV
    scratch_slot: int
    groups: Sequence[SiteGroup]
    body: Body
    graph: Callable[[], Graph]
    rows: Sequence[int] = ROWS
    most: int = MOST
    _kept: OrderedDict[tuple[int, int, frozenset[int]], _Captured] = field(default_factory=OrderedDict)
    _last: _Composition | None = None

    def run(self, step: DecodeStep) -> Tensor | None:
        """Logits ``[rows, vocab]``, valid until the next call; None where the step has to go the usual way.

        That is: more rows than any graph has, a rank above the largest, or a delta with steps beyond the kernels, with
        inputs or norms that are transformed, or with several steps at one place that build on each other.
        """
        count = len(step.ids)
        at = bisect_left(self.rows, count)
        last = self._composition(step.deltas)
        if at == len(self.rows) or last.units is None or last.rank > RANKS[-1]:
            return None
        key = (self.rows[at], RANKS[bisect_left(RANKS, last.rank)], last.reach)
        found = self._kept.get(key) or self._new(*key)
        if found.plan is not None and found.loaded is not last:
            if not found.plan.holds(last.units):
                self._last = _Composition(last.deltas, None)  # not to be tried again
                return None
            found.plan.load(last.units)
            found.loaded = last
        self._fill(found, step)
        if found.logits is None:
            found.logits = found.graph.capture(lambda: self._pass(found))
            self._keep(key, found)
        self._kept.move_to_end(key)
        found.graph.replay()
        return found.logits[:count]

    def forget(self) -> None:
        """A delta left the device: what was planned for it must not be taken for another's."""
        self._last = None
        for found in self._kept.values():
            found.loaded = None

    def _composition(self, deltas: Sequence[PackedDelta | None]) -> _Composition:
        """Planned anew only when the rows' deltas are others."""
        last = self._last
        if last is not None and len(last.deltas) == len(deltas) and all(map(is_, last.deltas, deltas)):
            return last
        units = self.ops.units([Segment(i, 1, delta) for i, delta in enumerate(deltas)])
        if units is None:
            self._last = _Composition(list(deltas), None)
        else:
            rank = int(units.lines[:, RANK].max(initial=0))
            self._last = _Composition(list(deltas), units, rank, frozenset(units.group.tolist()))
        return self._last

    def _new(self, rows: int, rank: int, reach: frozenset[int]) -> _Captured:
        device, plan = self.ops.device, None
        if reach:
            room = {
                group.index: Room(
                    rows * len(group.sites),
                    group.out_features,
                    all(n % ALIGNED == 0 for n in (*group.offsets, group.out_features)),
                )
                for group in self.groups
                if group.index in reach
            }
            plan = self.ops.static(room, rank)
        inputs = torch.zeros((4, rows), dtype=torch.int64, device=device)
        staged = torch.zeros((4, rows), dtype=torch.int64, pin_memory=device.type == "cuda")
        return _Captured(self.graph(), inputs, staged, plan)

    def _fill(self, found: _Captured, step: DecodeStep) -> None:
        count = len(step.ids)
        for slot, start in zip(step.slots, step.starts, strict=True):
            self.kv.note(slot, start, start + 1)
        if count < found.inputs.shape[1]:
            self.kv.note(self.scratch_slot, 0, 1)
        self.kv.commit()
        found.staged.zero_()
        found.staged[2] = self.scratch_slot
        found.staged[:, :count] = torch.tensor([step.ids, step.positions, step.slots, step.starts])
        found.inputs.copy_(found.staged, non_blocking=True)

    def _pass(self, found: _Captured) -> Tensor:
        ids, positions, slots, places = found.inputs
        attention = Attention.decoding(self.kv, self.ops.rows, slots, places)
        return self.body(attention, positions, ids, found.plan)

    def _keep(self, key: tuple[int, int, frozenset[int]], found: _Captured) -> None:
        self._kept[key] = found
        if len(self._kept) > self.most:
            self._kept.popitem(last=False)
