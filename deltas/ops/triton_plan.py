"""Plans for the Triton kernels: a batch's table on the device, and for each group which of its lines are launched when.

Lines of one group that change the same columns of the same tokens (a chain of bottlenecks) go in *waves*, one launch
after another; nearly always there is one wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltas.batch import Hooked, Segment
from deltas.ops import reference
from deltas.ops.native import ENTRY_FIELDS
from deltas.ops.table import FIRST_EFFECT, LAST_EFFECT, ROW0, ROWS, TILE, DeltaTables, Table, looped_of
from deltas.ops.transforms import BatchTransforms

RANK, OUT0, OUT = (ENTRY_FIELDS.index(name) for name in ("rank", "out0", "out"))

ALIGNED = 16
"""Columns whose multiples the kernels read and write in whole words of memory."""


class Wave(NamedTuple):
    """Lines ``first .. first+units`` of a table, launched together; see :func:`deltas.ops.triton_kernels.patch`."""

    first: int
    units: int
    rank: int
    out: int
    aligned: bool


@dataclass(frozen=True)
class Units:
    """The lines of a composition that change something, sorted by group, then by wave.

    ``lines`` int64 ``[n, len(ENTRY_FIELDS)]``, each of at most ``TILE`` tokens; ``group``, ``wave`` ``[n]``.
    """

    lines: Table
    group: Table
    wave: Table

    @staticmethod
    def of(tables: DeltaTables, segments: Sequence[Segment]) -> Units:
        """The plain steps of the segments' deltas; what kernels cannot apply is in none of the tables."""
        parts: list[Table] = []
        waves: list[Table] = []
        for segment in segments:
            if segment.delta is None:
                continue
            own = tables.of(segment.delta)
            wave = _waves(own)
            for first in range(0, segment.rows, TILE):
                part = own.copy()
                part[:, :, ROW0] = segment.row0 + first
                part[:, :, ROWS] = min(TILE, segment.rows - first)
                parts.append(part)
                waves.append(wave)
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            return Units(np.zeros((0, len(ENTRY_FIELDS)), dtype=np.int64), none, none)
        table, wave = np.concatenate(parts, axis=1), np.concatenate(waves, axis=1)
        group, entry = np.nonzero((table[:, :, FIRST_EFFECT : LAST_EFFECT + 1] != 0).any(axis=2))
        order = np.lexsort((wave[group, entry], group))
        group, entry = group[order], entry[order]
        return Units(np.ascontiguousarray(table[group, entry]), group, wave[group, entry])

    def waves(self) -> dict[int, list[Wave]]:
        """By group, its launches in order."""
        found: dict[int, list[Wave]] = {}
        if not len(self.lines):
            return found
        new = (np.diff(self.group) != 0) | (np.diff(self.wave) != 0)
        starts = [0, *(np.nonzero(new)[0] + 1).tolist()]
        ranks = np.maximum.reduceat(self.lines[:, RANK], starts).tolist()
        outs = np.maximum.reduceat(self.lines[:, OUT], starts).tolist()
        aligned = np.logical_and.reduceat(is_aligned(self.lines), starts).tolist()
        groups = self.group[starts].tolist()
        ends = [*starts[1:], len(self.lines)]
        for i, group in enumerate(groups):
            wave = Wave(starts[i], ends[i] - starts[i], ranks[i], outs[i], aligned[i])
            found.setdefault(group, []).append(wave)
        return found


def is_aligned(lines: Table) -> Table:
    """By line: whether its first column and its number of columns are multiples of ``ALIGNED``. Boolean ``[n]``."""
    aligned: Table = (lines[:, OUT0] % ALIGNED == 0) & (lines[:, OUT] % ALIGNED == 0)
    return aligned


def _waves(own: Table) -> Table:
    """Of a delta's own table: how many lines directly before it each one must wait for. int64 ``[groups, entries]``."""
    wave = np.zeros(own.shape[:2], dtype=np.int64)
    for j in range(1, own.shape[1]):
        before, this = own[:, j - 1], own[:, j]
        follows = (this[:, OUT0] < before[:, OUT0] + before[:, OUT]) & (
            before[:, OUT0] < this[:, OUT0] + this[:, OUT]
        )
        wave[:, j] = np.where(follows, wave[:, j - 1] + 1, 0)
    return wave


@dataclass(frozen=True, eq=False)
class TritonPlan:
    """Short segments by the Triton kernels, long ones by GEMMs. The segments keep their deltas alive."""

    tables: DeltaTables
    device: torch.device
    narrow: Sequence[Segment]
    wide: Sequence[Segment]

    @cached_property
    def _units(self) -> Units:
        return Units.of(self.tables, self.narrow)

    @cached_property
    def _waves(self) -> dict[int, list[Wave]]:
        return self._units.waves()

    @cached_property
    def _table(self) -> Tensor:
        return torch.from_numpy(self._units.lines).to(self.device)

    @cached_property
    def _looped(self) -> dict[int, list[Segment]]:
        return looped_of(self.narrow)

    @cached_property
    def _transforms(self) -> BatchTransforms:
        return BatchTransforms(self.narrow)

    def active(self, group: int) -> bool:
        if group in self._waves or group in self._looped or group in self._transforms:
            return True
        return any(s.delta is not None and group in s.delta.patches for s in self.wide)

    def feed(self, group: int, x: Tensor, columns: int, /) -> Tensor:
        return self._transforms.feed(group, x, columns)

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        self._transforms.apply(group, x, y, hooked)
        for wave in self._waves.get(group, ()):
            launch(self._table, wave, x, y)
        for segment in self._looped.get(group, ()):
            if segment.delta is not None:
                reference.apply_wide(segment.delta.rest[group], x, y, hooked, segment.slice)
        for segment in self.wide:
            steps = segment.delta.patches.get(group) if segment.delta is not None else None
            if steps:
                reference.apply_wide(steps, x, y, hooked, segment.slice)


class Room(NamedTuple):
    """What a static plan has for a group: lines of the table, the most columns of any, and whether all are aligned."""

    lines: int
    out: int
    aligned: bool


@dataclass(eq=False)
class StaticPlan:
    """A plan whose launches do not depend on the composition, so that a CUDA graph may hold them.

    ``groups`` are those that it launches anything at. No unit's rank may be above ``rank``. :meth:`load` puts a
    composition into the table, which stays where it is; every line that it leaves empty ends at once.
    """

    groups: dict[int, Room]
    rank: int
    device: torch.device

    def __post_init__(self) -> None:
        firsts = np.cumsum([0, *(room.lines for room in self.groups.values())]).tolist()
        self._waves = {
            group: Wave(first, room.lines, self.rank, room.out, room.aligned)
            for first, (group, room) in zip(firsts[:-1], self.groups.items(), strict=True)
        }
        pin = self.device.type == "cuda"
        shape = (firsts[-1], len(ENTRY_FIELDS))
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=pin)
        self._table = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def load(self, units: Units) -> None:
        """Takes a composition that :meth:`holds`."""
        lines = self._host.numpy()
        lines[:] = 0
        if len(units.lines):
            first = np.array([self._waves[group].first for group in units.group.tolist()], dtype=np.int64)
            begins = np.r_[0, np.nonzero(np.diff(units.group))[0] + 1]
            within = np.arange(len(units.group)) - np.repeat(begins, np.diff(np.r_[begins, len(units.group)]))
            lines[first + within] = units.lines
        self._table.copy_(self._host, non_blocking=True)

    def holds(self, units: Units) -> bool:
        """Whether :meth:`load` can take these: known groups, room for their lines, ranks, and a single wave each."""
        for group, waves in units.waves().items():
            room, only = self.groups.get(group), waves[0]
            if room is None or len(waves) > 1 or only.units > room.lines or only.out > room.out:
                return False
            if only.rank > self.rank or only.aligned < room.aligned:
                return False
        return True

    def active(self, group: int) -> bool:
        return group in self._waves

    def feed(self, _group: int, x: Tensor, _columns: int, /) -> Tensor:
        return x

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        del hooked  # nothing here asks the module
        launch(self._table, self._waves[group], x, y)


def launch(table: Tensor, wave: Wave, x: Tensor, y: Tensor) -> None:
    """One wave's launches."""
    from deltas.ops import triton_kernels  # Triton may not be installed where nothing is launched

    lines = table[wave.first : wave.first + wave.units]
    rank = -(-wave.rank // TILE) * TILE
    triton_kernels.patch(lines, x, y, rank=rank, out=wave.out, aligned=wave.aligned)
