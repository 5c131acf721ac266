"""Every step that is not a :class:`~deltas.bank.SitePatch`, by torch operations on one segment's tokens.

Each computes in the arena's dtype, as the backbone's own layers do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import Placed
from deltas.batch import Hooked
from deltas.ops import sparse
from deltas.ops.adapters import adapt, couple, opening
from deltas.ops.native import Kernels
from deltas.patches import (
    Bottleneck,
    Coupling,
    DenseDiff,
    EmbeddingLowRank,
    EmbeddingRows,
    Fusion,
    Gain,
    GatedGain,
    GatedLowRank,
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


def apply(
    step: Placed, x: Tensor, y: Tensor, hooked: Hooked, tokens: slice, kernels: Kernels | None = None
) -> None:
    """Changes ``y`` ``[tokens, out]`` in place; ``x`` ``[tokens, in]``, or token ids ``[tokens]`` at an embedding.

    Both are the tokens ``tokens`` of the batch: one segment's. ``kernels`` apply what they can, torch the rest.
    """
    match step.patch:
        case Bottleneck() | Fusion() as block:
            adapt(block, x, y, hooked, tokens)
        case Coupling() as coupling:
            couple(coupling, y)
        case GatedLowRank(down=down, up=up, gate=gate):
            y += opening(gate, x) * (F.linear(x, down) @ up)
        case GatedGain(gain=gain, gate=gate, rest=rest):
            y *= rest + opening(gate, x) * gain
        case Gain(gain=gain):
            y *= gain
        case Shift(beta=beta):
            y += beta
        case InputGain(gain=gain):
            y.copy_(hooked.linear(step.out0, step.out, x * gain))
        case Rotation(blocks=blocks) if not x.is_floating_point():  # an embedding: what it gives is turned
            y.copy_(rotated(y, blocks))
        case Rotation(blocks=blocks):
            y.copy_(hooked.linear(step.out0, step.out, rotated(x, blocks)))
        case Mix(own=own, other=other, partner=partner):
            y.copy_(own * y + other * y[:, partner])
        case DenseDiff(matrix=matrix):
            y += _changed(x, matrix, hooked)
        case SparseDiff() | SparseRows() as change:
            sparse.add(change, x, y, kernels)
        case Kronecker(left=left, right=right):
            y += _kronecker(x, left, right)
        case Override(weight=weight, bias=bias):
            y.copy_(_overridden(x, weight, bias, hooked))
        case EmbeddingRows(indices=indices, rows=rows):
            same = x[:, None] == indices
            y.copy_(torch.where(same.any(1, keepdim=True), rows[same.int().argmax(1)], y))
        case EmbeddingLowRank(table=table, up=up):
            y += table[x] @ up
        case OutputRows(indices=indices, rows=rows):
            bias = hooked.bias(step.out0, step.out)
            y[:, indices] = F.linear(x, rows, None if bias is None else bias[indices])
        case other:
            raise TypeError(f"no operation for {type(other).__name__}")


def rotated(x: Tensor, blocks: Tensor) -> Tensor:
    """``x`` ``[tokens, in]`` with every block of a row times its own matrix; ``blocks`` ``[count, size, size]``."""
    count, size, _ = blocks.shape
    return torch.einsum("tki,kij->tkj", x.reshape(-1, count, size), blocks).reshape(x.shape)


def _changed(x: Tensor, matrix: Tensor, hooked: Hooked) -> Tensor:
    """What a change of the weight adds: every module here is linear in its weight."""
    if not x.is_floating_point():
        return F.embedding(x, matrix)
    return hooked.norm_change(x, matrix) if matrix.dim() == 1 else F.linear(x, matrix)


def _kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``(left kron right) x``: right on the inner index, left on the outer one."""
    inner = torch.matmul(x.reshape(-1, left.shape[1], right.shape[1]), right.T)  # [t, b, c]
    return torch.matmul(left, inner).reshape(x.shape[0], -1)


def _overridden(x: Tensor, weight: Tensor, bias: Tensor | None, hooked: Hooked) -> Tensor:
    if not x.is_floating_point():
        return F.embedding(x, weight)
    if weight.dim() == 1:
        return hooked.norm(x, weight, bias)
    return F.linear(x, weight, bias)
