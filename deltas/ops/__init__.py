"""The batched primitives, and the one place that chooses between their implementations.

``reference`` is the truth; ``table`` + ``native`` the C kernels (CPU with a compiler); ``dense`` plain torch
operations (no compiler, or a GPU); ``training`` what gradients flow through. All give the same result, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.batch import Hooked, Plan, Segment, merge
from deltas.ops import native, reference
from deltas.ops.dense import DensePlan
from deltas.ops.table import DeltaTables, NativePlan, is_wide
from deltas.ops.training import TrainingPlan

Mode = Literal["native", "dense", "reference", "training"]
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class ReferencePlan:
    """Every segment by loops."""

    segments: Sequence[Segment]

    def active(self, group: int) -> bool:
        return any(s.delta is not None and group in s.delta.patches for s in self.segments)

    def feed(self, _group: int, x: Tensor, _columns: int, /) -> Tensor:
        return x

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        for segment in self.segments:
            steps = segment.delta.patches.get(group) if segment.delta is not None else None
            if steps:
                reference.apply(steps, x, y, hooked, segment.slice)


@dataclass(eq=False)
class Ops:
    """The chosen implementation for one device and dtype. ``mode`` None chooses the fastest there is."""

    groups: int
    device: torch.device
    dtype: torch.dtype
    mode: Mode | None = None
    kernels: native.Kernels | None = None
    _tables: DeltaTables = field(init=False)

    def __post_init__(self) -> None:
        self._tables = DeltaTables(self.groups)
        if self.mode in (None, "native") and self.device.type == "cpu" and self.dtype in NATIVE_DTYPES:
            self.kernels = native.load()
        if self.mode is None:
            self.mode = "native" if self.kernels is not None else "dense"
        if self.mode == "native" and self.kernels is None:
            raise RuntimeError(f"the C kernels are not available: {native.why_unavailable()}")

    def plan(self, segments: Sequence[Segment], tokens: int) -> Plan | None:
        """Plans one composition of ``tokens`` packed tokens; None where the backbone alone serves every row."""
        joined = merge(segments)
        if not joined:
            return None
        if self.mode == "reference":
            return ReferencePlan(joined)
        if self.mode == "training":
            return TrainingPlan(joined)
        if self.mode == "dense" or self.kernels is None:
            return DensePlan(joined, tokens)
        narrow: list[Segment] = []
        wide: list[Segment] = []
        for segment in joined:
            (wide if is_wide(segment) else narrow).append(segment)
        return NativePlan(self.kernels, self._tables, narrow, wide)

    def forget(self, delta: PackedDelta) -> None:
        """A delta left the device: drop what was kept for it."""
        self._tables.forget(delta)
