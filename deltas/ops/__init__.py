"""The batched primitives, and the one place that chooses between their implementations.

``reference`` is the truth; ``table`` + ``native`` the C kernels (CPU with a compiler); ``table`` + ``triton_plan`` the
Triton kernels (CUDA); ``dense`` plain torch operations (where neither can be had); ``training`` what gradients flow
through. All give the same result, to rounding.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.batch import Hooked, Plan, Segment, merge
from deltas.ops import native, reference
from deltas.ops.dense import DensePlan
from deltas.ops.rows import RowKernels
from deltas.ops.table import DeltaTables, NativePlan, is_wide
from deltas.ops.training import TrainingPlan
from deltas.ops.triton_plan import Room, StaticPlan, TritonPlan, Units

Mode = Literal["native", "triton", "dense", "reference", "training"]
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """The chosen implementation for one device and dtype. ``mode`` None chooses the fastest there is.

    ``kernels`` are the C kernels, where they are used; ``rows`` what computes norms, gates, rotations and attention of
    single rows: the C kernels, Triton's, or None for torch's operations. Raises RuntimeError if ``mode`` cannot be had.
    """

    groups: int
    device: torch.device
    dtype: torch.dtype
    mode: Mode | None = None
    kernels: native.Kernels | None = None
    rows: RowKernels | None = field(init=False, default=None)
    _tables: DeltaTables = field(init=False)

    def __post_init__(self) -> None:
        self._tables = DeltaTables(self.groups)
        if self.mode in (None, "native") and self.device.type == "cpu" and self.dtype in NATIVE_DTYPES:
            self.kernels = native.load()
        if self.mode is None and self.device.type == "cuda" and has_triton() and self.dtype in TRITON_DTYPES:
            self.mode = "triton"
        if self.mode is None:
            self.mode = "native" if self.kernels is not None else "dense"
        if self.mode == "native" and self.kernels is None:
            raise RuntimeError(f"the C kernels are not available: {native.why_unavailable()}")
        self.rows = self._triton() if self.mode == "triton" else self.kernels

    def _triton(self) -> RowKernels:
        if not has_triton():
            raise RuntimeError("the Triton kernels are not available: there is no package triton")
        from deltas.ops.triton_kernels import INTERPRETED
        from deltas.ops.triton_rows import TritonKernels

        if self.device.type != "cuda" and not INTERPRETED:
            raise RuntimeError(
                f"the Triton kernels run on CUDA devices, not on {self.device.type} (but by Triton's interpreter, "
                "for tests: TRITON_INTERPRET=1)"
            )
        if self.dtype not in TRITON_DTYPES:
            raise RuntimeError(f"the Triton kernels do not compute in {self.dtype}")
        return TritonKernels()

    def plan(self, segments: Sequence[Segment], tokens: int) -> Plan | None:
        """Plans one composition of ``tokens`` packed tokens; None where the backbone alone serves every row."""
        joined = merge(segments)
        if not joined:
            return None
        if self.mode == "reference":
            return ReferencePlan(joined)
        if self.mode == "training":
            return TrainingPlan(joined)
        if self.mode == "dense":
            return DensePlan(joined, tokens)
        narrow: list[Segment] = []
        wide: list[Segment] = []
        for segment in joined:
            (wide if is_wide(segment) else narrow).append(segment)
        if self.kernels is not None:
            return NativePlan(self.kernels, self._tables, narrow, wide)
        return TritonPlan(self._tables, self.device, narrow, wide)

    def static(self, groups: dict[int, Room], rank: int) -> StaticPlan:
        """A plan of fixed launches, for a CUDA graph (see :class:`~deltas.ops.triton_plan.StaticPlan`); ``triton`` only."""
        return StaticPlan(groups, rank, self.device)

    def units(self, segments: Sequence[Segment]) -> Units | None:
        """What a static plan is given of a composition; None where some step of it needs more than such a plan does."""
        joined = merge(segments)
        if any(s.delta is not None and (s.delta.looped or s.delta.transforms) for s in joined):
            return None
        return Units.of(self._tables, joined)

    def forget(self, delta: PackedDelta) -> None:
        """A delta left the device: drop what was kept for it."""
        self._tables.forget(delta)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; that it finds a device is another matter."""
    return importlib.util.find_spec("triton") is not None
