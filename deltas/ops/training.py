"""Rows that are trained: every step by operations that gradients flow through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltas.batch import Hooked, Segment
from deltas.ops import reference


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """Segment by segment, each by its own products, in the backbone's dtype.

    A segment's tensors take part in nothing but its own rows, so neither a value nor a gradient of one reaches another.
    """

    segments: Sequence[Segment]

    def active(self, group: int) -> bool:
        return any(s.delta is not None and group in s.delta.patches for s in self.segments)

    def feed(self, _group: int, x: Tensor, _columns: int, /) -> Tensor:
        return x

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        for segment in self.segments:
            steps = segment.delta.patches.get(group) if segment.delta is not None else None
            if steps:
                reference.apply_wide(steps, x, y, hooked, segment.slice)
