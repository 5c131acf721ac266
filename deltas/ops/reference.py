"""The truth: patches applied by plain loops, one segment and one site at a time, in float32.

Every faster implementation is checked against this one. It is also what a segment of many tokens uses on any
device, since there one ordinary GEMM per delta is the fastest way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import SitePatch
from deltas.patches import Activation, BlockInput


def activate(h: Tensor, activation: Activation) -> Tensor:
    """The non-linearity inside a bottleneck, elementwise."""
    match activation:
        case Activation.IDENTITY:
            return h
        case Activation.RELU:
            return F.relu(h)
        case Activation.SILU:
            return F.silu(h)
        case Activation.GELU:
            return F.gelu(h)
        case Activation.GELU_TANH:
            return F.gelu(h, approximate="tanh")
        case Activation.TANH:
            return torch.tanh(h)
        case Activation.SIGMOID:
            return torch.sigmoid(h)
        case Activation.LEAKY_RELU:
            return F.leaky_relu(h, 0.01)


def block_input(reads: BlockInput | None, x: Tensor, y: Tensor) -> Tensor:
    """What a patch reads: the site's input ``x`` for None; for a block site ``x`` is the residual, ``y`` the output."""
    match reads:
        case None | BlockInput.RESIDUAL:
            return x
        case BlockInput.OUTPUT:
            return y
        case BlockInput.OUTPUT_AND_RESIDUAL:
            return y + x


def contribution(patch: SitePatch, x: Tensor, y: Tensor) -> Tensor:
    """What the patch adds to ``y[:, out0:out0+out]``; float32 ``[tokens, out]``.

    ``x`` ``[tokens, in]`` and ``y`` ``[tokens, all columns of the group]``, any float dtype.
    """
    added = torch.zeros(x.shape[0], patch.out, dtype=torch.float32, device=x.device)
    if patch.down is not None and patch.up is not None:
        columns = y[:, patch.out0 : patch.out0 + patch.out]
        z = block_input(patch.reads, x.float(), columns.float())
        bias = None if patch.down_bias is None else patch.down_bias.float()
        h = activate(F.linear(z, patch.down.float(), bias), patch.activation)
        added = h @ patch.up.float()
    if patch.shift is not None:
        added = added + patch.shift.float()
    return added


def apply(patches: tuple[SitePatch, ...], x: Tensor, y: Tensor) -> None:
    """Adds every patch's contribution to ``y`` in place, in float32, rounding once to y's dtype."""
    for patch in patches:
        columns = y[:, patch.out0 : patch.out0 + patch.out]
        columns.copy_(columns.float() + contribution(patch, x, y))


def apply_wide(patches: tuple[SitePatch, ...], x: Tensor, y: Tensor) -> None:
    """:func:`apply` for many tokens: GEMMs in the arena's dtype, as the backbone's own layers compute."""
    for patch in patches:
        columns = y[:, patch.out0 : patch.out0 + patch.out]
        if patch.down is not None and patch.up is not None:
            z = block_input(patch.reads, x, columns)
            h = activate(F.linear(z, patch.down, patch.down_bias), patch.activation)
            if patch.shift is not None:
                columns += patch.shift
            columns.addmm_(h, patch.up)
        elif patch.shift is not None:
            columns += patch.shift
