"""What one step computes, as the scheduler says it to the runner. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Compute ``count`` tokens of ``seq`` from ``start`` on and, if ``samples``, choose the next one."""

    seq: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class Plan:
    """One step.

    ``rows`` are decode rows (count 1), then prefill chunks; within each of the two, rows of one delta are adjacent, base
    rows first, otherwise in order of admission. ``preempted`` rows lost their slot in this call, and wait again; then
    ``admitted`` got one. ``rejected`` turned out not to fit behind their delta's prefix: they are gone from the scheduler
    and must be answered with an error. The memory of ``emptied`` slots may be given back once the admitted have begun.
    """

    rows: list[PlannedRow]
    decode_rows: int
    admitted: list[Sequence] = field(default_factory=list)
    rejected: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)

    @property
    def composition(self) -> tuple[tuple[int, int], ...]:
        """Hashable; equal for plans of equally many tokens of the same rows in the same order."""
        return tuple((row.seq.id, row.count) for row in self.rows)

    @property
    def tokens(self) -> int:
        """How many tokens the step computes."""
        return sum(row.count for row in self.rows)
