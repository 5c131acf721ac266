"""Steps that change nothing whatever they are given: factors of zero, gains of one, the backbone's own values.

Decided from the step's own numbers, as they are served. A pass could not tell: steps that compute a module anew
(overrides, rotations, input gains) round in another order than the backbone, so even one that changes nothing moves
last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltas.bank import Applied, SitePatch
from deltas.patches import (
    DenseDiff,
    EmbeddingLowRank,
    EmbeddingRows,
    Gain,
    InputGain,
    Kronecker,
    Mix,
    OutputRows,
    Override,
    Rotation,
    Shift,
    SparseDiff,
)
from deltas.sparse import SparseRows

NEAR = 1e-6
"""How far from one a gain may be and still be one: what a quotient of two norms of the same weights is off by."""

Own = Callable[[], tuple[Tensor, Tensor | None]]
"""The backbone's own weight and bias where a step acts; called only for steps that replace them."""


def inert(step: Applied, own: Own) -> bool:
    """Does this step leave every output as it is? False for a kind of patch that is not known here."""
    if isinstance(step, SitePatch):
        return _site_patch(step)
    match step.patch:
        case Gain(gain=gain) | InputGain(gain=gain):
            return _ones(gain)
        case Shift(beta=beta):
            return _zero(beta)
        case Rotation(blocks=blocks):
            return _near(blocks, torch.eye(blocks.shape[-1], device=blocks.device))
        case Mix(own=kept, other=other):
            return _ones(kept) and _near(other, 0.0)
        case DenseDiff(matrix=matrix):
            return _zero(matrix)
        case SparseDiff(values=values) | SparseRows(values=values):
            return _zero(values)
        case Kronecker(left=left, right=right):
            return _zero(left) or _zero(right)
        case EmbeddingLowRank(table=table, up=up):
            return _zero(table) or _zero(up)
        case Override(weight=weight, bias=bias):
            own_weight, own_bias = own()
            return torch.equal(weight, own_weight) and _same_bias(bias, own_bias)
        case EmbeddingRows(indices=indices, rows=rows) | OutputRows(indices=indices, rows=rows):
            return torch.equal(rows, own()[0][indices])
        case _:
            return False


def _site_patch(step: SitePatch) -> bool:
    adds_nothing = step.down is None or step.up is None or _zero(step.up)
    if not adds_nothing and step.down is not None:
        adds_nothing = step.reads is None and step.down_bias is None and _zero(step.down)
    if step.gain is None:
        return adds_nothing and (step.shift is None or _zero(step.shift))
    # DoRA's shift is the bias times what the gain is short of one, so it is as near to zero as the gain to one
    return adds_nothing and _ones(step.gain) and (step.shift is None or _near(step.shift, 0.0))


def _zero(tensor: Tensor) -> bool:
    return not bool(tensor.any())


def _ones(tensor: Tensor) -> bool:
    return _near(tensor, 1.0)


def _near(tensor: Tensor, value: Tensor | float) -> bool:
    return bool((tensor.float() - value).abs().le(NEAR).all())


def _same_bias(bias: Tensor | None, own: Tensor | None) -> bool:
    if bias is None or own is None:
        present = own if bias is None else bias
        return present is None or _zero(present)
    return torch.equal(bias, own)
