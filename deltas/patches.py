"""Patches: the primitive changes at one site. Every method lowers to a list of these.

The general form at a linear site is ``y = W x + b + s * B (A x) + beta``; a bottleneck changes a sublayer's
output ``h <- h + s * (f(D z + d) U + u)`` with ``z`` chosen by :class:`BlockInput`; a prefix is keys and values
put before a row's own. Tensors are stored the way the kernels read them: a factor that is applied by dot
products as ``[rank, in]``, one that is applied by additions as ``[rank, out]``. Scales are folded into the
second factor when a method lowers, in float32.

``LowRank`` and ``Bottleneck`` share that layout on purpose: a low-rank patch is a bottleneck with the identity
between its two factors and no biases, so one kernel serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from torch import Tensor


class Activation(IntEnum):
    """The non-linearity inside a bottleneck. The numbers are shared with ``ops/kernels.c``."""

    IDENTITY = 0
    RELU = 1
    SILU = 2
    GELU = 3  # exact, by erf
    GELU_TANH = 4  # "gelu_new"
    TANH = 5
    SIGMOID = 6
    LEAKY_RELU = 7  # slope 0.01


class BlockInput(StrEnum):
    """What a bottleneck reads: ``h`` is the sublayer's output, ``i`` the residual that will be added to it."""

    OUTPUT = "output"  # h
    OUTPUT_AND_RESIDUAL = "output+residual"  # h + i
    RESIDUAL = "residual"  # i


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``y += up^T (down x)`` at a linear site; ``down`` is ``[rank, in]``, ``up`` is ``[rank, out]``."""

    site: str
    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """``y += beta`` at a linear or norm site; ``beta`` is ``[out]``."""

    site: str
    beta: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """``h += up^T f(down z + down_bias) + up_bias`` at a block site, ``z`` by ``reads``.

    ``down`` ``[width, hidden]``, ``up`` ``[width, hidden]``, ``down_bias`` ``[width]``, ``up_bias`` ``[hidden]``.
    """

    site: str
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: Activation
    reads: BlockInput


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """``embeddings`` ``[n, hidden]`` put before a row's token embeddings; real tokens' positions shift by n.

    On a causal backbone this is constant, so the engine turns it into a :class:`KVPrefix` per layer, once.
    """

    embeddings: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KVPrefix:
    """Keys and values ``[n, kv_heads, head_dim]`` of one layer, put before a row's own.

    ``shifts_positions``: whether the row's own tokens start at position n (else 0).
    """

    site: str
    keys: Tensor
    values: Tensor
    shifts_positions: bool


Patch = LowRank | Shift | Bottleneck | SoftPrompt | KVPrefix
