"""Rows that are trained: every step by operations that gradients flow through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import SitePatch
from deltas.batch import Hooked, Segment
from deltas.ops import reference
from deltas.ops.inputs import activate, block_input


class _AddProduct(torch.autograd.Function):
    """``y[rows, columns] += h @ up`` in place. What autograd makes of a step on a view copies the whole gradient of y,
    once for each step; a sum's gradient is the gradient of what it is added to, which needs no copy."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, up: Tensor, rows: slice, columns: slice) -> Tensor:
        ctx.save_for_backward(h, up)
        ctx.place = rows, columns
        y[rows, columns].addmm_(h, up)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        h, up = ctx.saved_tensors
        own = grads[0][ctx.place]
        return grads[0], own @ up.T, h.T @ own, None, None


class _AddVector(torch.autograd.Function):
    """``y[rows, columns] += shift`` in place, likewise."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shift: Tensor, rows: slice, columns: slice) -> Tensor:
        ctx.place = rows, columns
        y[rows, columns] += shift
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grads[0], grads[0][ctx.place].sum(0), None, None


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
        for segment, own in zip(self.segments, _shares(x, self.segments), strict=True):
            for step in segment.delta.patches.get(group, ()) if segment.delta is not None else ():
                if torch.is_grad_enabled() and isinstance(step, SitePatch) and step.gain is None:
                    _add(step, own, y, hooked, segment.slice)
                else:
                    reference.apply_wide([step], x, y, hooked, segment.slice)


def _shares(x: Tensor, segments: Sequence[Segment]) -> Sequence[Tensor]:
    """Each segment's part of ``x``, by one operation, hence with one gradient for all of them."""
    sizes, at = [], 0
    for segment in segments:
        sizes += [segment.row0 - at, segment.rows]
        at = segment.row0 + segment.rows
    return [x] if sizes == [0, len(x)] else torch.split(x, [*sizes, len(x) - at])[1::2]


def _add(step: SitePatch, x: Tensor, y: Tensor, hooked: Hooked, rows: slice) -> None:
    """A step that only adds, as :func:`~deltas.ops.reference.apply_wide` does it; ``x`` are the segment's own rows."""
    columns = slice(step.out0, step.out0 + step.out)
    h = None
    if step.down is not None and step.up is not None:
        before = y if y.shape == (len(x), step.out) else y[rows, columns]
        h = F.linear(block_input(step.reads, x, before, hooked, rows), step.down, step.down_bias)
        h = activate(h, step.activation)
    if step.shift is not None:
        _AddVector.apply(y, step.shift, rows, columns)  # type: ignore[no-untyped-call]
    if h is not None:
        _AddProduct.apply(y, h, step.up, rows, columns)  # type: ignore[no-untyped-call]
