"""The patch table that the kernels read: one row of integers per (segment, site patch).

A packed delta's own table is made once. A batch's is the segments' tables stacked, with each segment's token range
filled in: one numpy operation whatever the number of deltas, so composing a batch stays cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from deltas.bank import PackedDelta, SitePatch
from deltas.batch import Hooked, Segment
from deltas.ops import reference
from deltas.ops.native import ENTRY_FIELDS, Kernels
from deltas.ops.transforms import BatchTransforms
from deltas.patches import BlockInput

Table = npt.NDArray[np.int64]

ROW0, ROWS = ENTRY_FIELDS.index("row0"), ENTRY_FIELDS.index("rows")
FIRST_EFFECT, LAST_EFFECT = (
    ENTRY_FIELDS.index("rank"),
    ENTRY_FIELDS.index("shift"),
)  # all zero: changes nothing
READS = {None: 0, BlockInput.OUTPUT: 1, BlockInput.OUTPUT_AND_RESIDUAL: 2, BlockInput.RESIDUAL: 3}

TILE = 16  # tokens, and ranks, of a tile of the Triton kernels: the smallest product on tensor cores

# Above this many tokens times ranks ordinary GEMMs win, below it their dispatch costs more than the arithmetic:
# 128 tokens of a rank-8 LoRA on every linear take 0.25 of 0.6 s for 4,096 prompt tokens on two cores.
WIDE = 8192


def is_wide(segment: Segment) -> bool:
    """Is this segment better served by ordinary GEMMs?"""
    return segment.delta is not None and segment.rows * segment.delta.widest > WIDE


def _entry(patch: SitePatch) -> list[int]:
    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return [
        0,
        0,
        patch.rank,
        address(patch.down),
        address(patch.down_bias),
        address(patch.up),
        address(patch.gain),
        address(patch.shift),
        patch.out0,
        patch.out,
        int(patch.activation),
        READS[patch.reads],
    ]


class DeltaTables:
    """The tables of packed deltas, each made at its first use and kept as long as the delta lives here."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._tables: dict[int, tuple[PackedDelta, Table]] = {}

    def of(self, delta: PackedDelta) -> Table:
        """int64 ``[groups, entries, len(ENTRY_FIELDS)]``; unused entries are zeros, which the kernel passes over."""
        known = self._tables.get(id(delta))
        if known is not None and known[0] is delta:
            return known[1]
        plain = {g: steps for g, steps in delta.rest.items() if g not in delta.looped}
        entries = max((len(steps) for steps in plain.values()), default=1)
        table: Table = np.zeros((self._groups, entries, len(ENTRY_FIELDS)), dtype=np.int64)
        for group, steps in plain.items():
            for j, step in enumerate(steps):
                if isinstance(step, SitePatch):
                    table[group, j] = _entry(step)
        self._tables[id(delta)] = (delta, table)
        return table

    def forget(self, delta: PackedDelta) -> None:
        """Called when a delta leaves the device."""
        self._tables.pop(id(delta), None)


def looped_of(segments: Sequence[Segment]) -> dict[int, list[Segment]]:
    """By group: the segments whose steps there are beyond the kernels."""
    found: dict[int, list[Segment]] = {}
    for segment in segments:
        for group in () if segment.delta is None else segment.delta.looped:
            found.setdefault(group, []).append(segment)
    return found


@dataclass(frozen=True, eq=False)
class NativePlan:
    """Short segments by the C kernel, long ones by GEMMs. The segments keep their deltas alive."""

    kernels: Kernels
    tables: DeltaTables
    narrow: Sequence[Segment]
    wide: Sequence[Segment]

    @cached_property
    def _table(self) -> Table | None:
        if not self.narrow:
            return None
        parts = []
        for segment in self.narrow:
            if segment.delta is None:
                continue
            part = self.tables.of(segment.delta).copy()
            part[:, :, ROW0] = segment.row0
            part[:, :, ROWS] = segment.rows
            parts.append(part)
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    @cached_property
    def _active(self) -> list[bool]:
        table = self._table
        if table is None:
            return []
        result: list[bool] = (table[:, :, FIRST_EFFECT : LAST_EFFECT + 1] != 0).any(axis=(1, 2)).tolist()
        return result

    @cached_property
    def _looped(self) -> dict[int, list[Segment]]:
        return looped_of(self.narrow)

    @cached_property
    def _transforms(self) -> BatchTransforms:
        """What comes before everything else, for all short segments at once."""
        return BatchTransforms(self.narrow)

    def active(self, group: int) -> bool:
        if (self._table is not None and self._active[group]) or group in self._looped:
            return True
        if group in self._transforms:
            return True
        return any(s.delta is not None and group in s.delta.patches for s in self.wide)

    def feed(self, group: int, x: Tensor, columns: int, /) -> Tensor:
        return self._transforms.feed(group, x, columns)

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        self._transforms.apply(group, x, y, hooked)
        table = self._table
        if table is not None and self._active[group]:
            self.kernels.patch(table[group], x, y)
        for segment in self._looped.get(group, ()):
            if segment.delta is not None:
                reference.apply_wide(segment.delta.rest[group], x, y, hooked, segment.slice)
        for segment in self.wide:
            steps = segment.delta.patches.get(group) if segment.delta is not None else None
            if steps:
                reference.apply_wide(steps, x, y, hooked, segment.slice, self.kernels)
