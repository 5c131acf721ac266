"""What a bottleneck can have beside its two factors, by torch operations on one segment's tokens.

The mathematics is that of AdapterHub's ``adapters`` (``methods/modeling.py`` there); see ``patches.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.batch import Hooked
from deltas.ops.inputs import activate, block_input
from deltas.patches import Affine, Bottleneck, Coupling, Fusion, Gate

_EPSILON = 1e-5  # torch's default, which the library's own norms have


def opening(gate: Gate, z: Tensor) -> Tensor:
    """How far a gate is open for the row whose tokens are ``z`` ``[tokens, in]``: ``[n]``."""
    return torch.sigmoid(F.linear(z, gate.weight, gate.bias)).mean(dim=0)


def adapt(patch: Bottleneck | Fusion, x: Tensor, y: Tensor, hooked: Hooked, rows: slice) -> None:
    """Changes a sublayer's output ``y`` ``[tokens, hidden]`` in place; ``x`` is the residual."""
    match patch:
        case Fusion():
            new = _fused(patch, x, y, hooked, rows)
        case Bottleneck():
            new = _adapted(patch, x, y, hooked, rows)
    y.copy_(new if patch.share == 1.0 else torch.lerp(y, new, patch.share))


def couple(patch: Coupling, y: Tensor) -> None:
    """Changes embeddings ``y`` ``[tokens, hidden]`` in place."""
    half = y.shape[-1] // 2
    a, b = y[:, :half], y[:, half:]
    a = a + _perceptron(patch.f_down, patch.f_up, patch, b)
    b = b + _perceptron(patch.g_down, patch.g_up, patch, a)
    y.copy_(torch.lerp(y, torch.cat([a, b], dim=-1), patch.share))


def _perceptron(down: Affine, up: Affine, patch: Coupling, x: Tensor) -> Tensor:
    return F.linear(activate(F.linear(x, down.weight, down.bias), patch.activation), up.weight, up.bias)


def _adapted(patch: Bottleneck, x: Tensor, y: Tensor, hooked: Hooked, rows: slice) -> Tensor:
    z = block_input(patch.reads, x, y, hooked, rows)
    added = _added(patch, z)
    if patch.gate is not None:
        added = added * opening(patch.gate, z)
    onto = block_input(patch.onto, x, y, hooked, rows)
    if patch.norm_around:
        return _normed(onto + added, patch.norm_after)
    return onto + _normed(added, patch.norm_after)


def _added(patch: Bottleneck, z: Tensor) -> Tensor:
    h = F.linear(_normed(z, patch.norm_before), patch.down, patch.down_bias)
    return activate(h, patch.activation) @ patch.up + patch.up_bias


def _normed(x: Tensor, norm: Affine | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, _EPSILON)


def _fused(patch: Fusion, x: Tensor, y: Tensor, hooked: Hooked, rows: slice) -> Tensor:
    z = block_input(patch.parts[0].reads, x, y, hooked, rows)
    onto = block_input(patch.onto, x, y, hooked, rows)
    options = torch.stack([_added(part, z) for part in patch.parts], dim=1)  # [tokens, parts, hidden]
    if patch.around:
        options = options + onto[:, None]
    query = _through(patch.query, block_input(patch.query_reads, x, y, hooked, rows))
    scores = (_through(patch.key, options) @ query[:, :, None]).squeeze(-1)
    mixed = (scores.softmax(-1)[:, None] @ _through(patch.value, options)).squeeze(1)
    return mixed if patch.around else mixed + onto


def _through(affine: Affine | None, x: Tensor) -> Tensor:
    return x if affine is None else F.linear(x, affine.weight, affine.bias)
