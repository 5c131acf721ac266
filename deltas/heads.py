"""Task heads: what a delta's own layers make of a row's last hidden states."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltas.ops.inputs import activate
from deltas.patches import Head, Pooling


def pool(hidden: Tensor, pooling: Pooling) -> Tensor:
    """``hidden`` ``[tokens, width]`` of one row -> ``[width]``, or all of it for ``none``."""
    match pooling:
        case Pooling.FIRST:
            return hidden[0]
        case Pooling.LAST:
            return hidden[-1]
        case Pooling.MEAN:
            return hidden.mean(0)
        case Pooling.NONE:
            return hidden


def apply(head: Head, hidden: Tensor) -> Tensor:
    """The head's outputs for one row's hidden states ``[tokens, width]``: ``[outputs]``, or ``[tokens, outputs]``."""
    return layers(head, pool(hidden, head.pooling))


def layers(head: Head, x: Tensor) -> Tensor:
    """What the head's layers make of pooled states ``[..., width]``: ``[..., outputs]``."""
    for layer in head.layers:
        x = activate(F.linear(x, layer.weight, layer.bias), layer.activation)
        if layer.norm is not None:
            x = F.layer_norm(x, layer.norm.shape, layer.norm, layer.norm_bias, layer.norm_eps)
    return x
