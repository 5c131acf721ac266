"""The truth: patches applied by plain loops, one segment and one site at a time, in float32.

Every faster implementation is checked against this one. It is also what a segment of many tokens uses on any
device, since there one ordinary GEMM per delta is the fastest way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import Applied, SitePatch
from deltas.batch import Hooked
from deltas.ops import placed
from deltas.ops.inputs import activate, block_input
from deltas.ops.native import Kernels


def _site_patch(patch: SitePatch, x: Tensor, columns: Tensor, hooked: Hooked, rows: slice) -> None:
    y = columns.float()
    if patch.down is not None and patch.up is not None:
        z = block_input(patch.reads, x, columns, hooked, rows).float()
        bias = None if patch.down_bias is None else patch.down_bias.float()
        h = activate(F.linear(z, patch.down.float(), bias), patch.activation)
        added = h @ patch.up.float()
    else:
        added = torch.zeros_like(y)
    if patch.gain is not None:
        y = y * patch.gain.float()
    if patch.shift is not None:
        added = added + patch.shift.float()
    columns.copy_(y + added)


def apply(steps: Sequence[Applied], x: Tensor, y: Tensor, hooked: Hooked, rows: slice) -> None:
    """Applies the steps in order to ``y[rows]`` in place, in float32, rounding to y's dtype after each.

    ``x`` and ``y`` hold the whole batch's tokens; see :class:`~deltas.batch.Plan`.
    """
    for step in steps:
        columns = y[rows, step.out0 : step.out0 + step.out]
        if isinstance(step, SitePatch):
            _site_patch(step, x[rows], columns, hooked, rows)
        else:
            placed.apply(step, x[rows], columns, hooked, rows)


def apply_wide(
    steps: Sequence[Applied],
    x: Tensor,
    y: Tensor,
    hooked: Hooked,
    rows: slice,
    kernels: Kernels | None = None,
) -> None:
    """:func:`apply` for many tokens: GEMMs in the arena's dtype, as the backbone's own layers compute."""
    for step in steps:
        columns = y[rows, step.out0 : step.out0 + step.out]
        if not isinstance(step, SitePatch):
            placed.apply(step, x[rows], columns, hooked, rows, kernels)
            continue
        h = None
        if step.down is not None and step.up is not None:
            z = block_input(step.reads, x[rows], columns, hooked, rows)
            h = activate(F.linear(z, step.down, step.down_bias), step.activation)
        if step.gain is not None:
            columns *= step.gain
        if step.shift is not None:
            columns += step.shift
        if h is not None and step.up is not None:
            columns.addmm_(h, step.up)
