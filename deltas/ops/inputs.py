"""What every implementation of a bottleneck shares: what it reads, and its non-linearity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.batch import Hooked
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


def block_input(reads: BlockInput | None, x: Tensor, y: Tensor, hooked: Hooked, rows: slice) -> Tensor:
    """What a patch reads: the site's input ``x`` for None; for a block site ``x`` is the residual, ``y`` the output."""
    match reads:
        case None | BlockInput.RESIDUAL:
            return x
        case BlockInput.OUTPUT:
            # what a gradient needs must not change when the result is added to it
            return y.clone() if torch.is_grad_enabled() else y
        case BlockInput.OUTPUT_AND_RESIDUAL:
            return y + x
        case BlockInput.NORMED:
            return hooked.normed(y + x)
        case BlockInput.INNER:
            return hooked.inner(rows)
