"""Patches: the primitive changes at one site. Every method lowers to a list of these.

At a linear site the general form is

    y = g * (W T(x) + b) + up^T (down x) + dW x + beta

where T is an input gain or a block rotation, g an output gain and dW dense, sparse or a Kronecker product: **every
addition is relative to the backbone's own output**, so patches of several deltas sum without disturbing one another
(`compose.py`). A bottleneck changes a sublayer's output ``h <- h + s * (f(D z + d) U + u)`` with ``z`` chosen by
:class:`BlockInput`; a prefix is keys and values put before a row's own; an override replaces a module's values.

Tensors are stored the way the kernels read them: a factor that is applied by dot products as ``[rank, in]``, one that
is applied by additions as ``[rank, out]``. Scales are folded into the second factor when a method lowers, in float32.

``LowRank`` and ``Bottleneck`` share that layout on purpose: a low-rank patch is a bottleneck with the identity
between its two factors and no biases, so one kernel serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from deltas.adapters import (
    Activation,
    Affine,
    BlockInput,
    Bottleneck,
    Coupling,
    Fusion,
    Gate,
    GatedGain,
    GatedLowRank,
)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``y += up^T (down x)`` at a linear site; ``down`` is ``[rank, in]``, ``up`` is ``[rank, out]``."""

    site: str
    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """``y += beta`` at a linear, norm or embedding site; ``beta`` is ``[out]``."""

    site: str
    beta: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Gain:
    """``y <- gain * y`` on the backbone's own output (bias included), before additions; ``gain`` is ``[out]``.

    ``multiplies``: two such gains multiply (as IA3's do); otherwise what they change adds up (as DoRA's do).
    """

    site: str
    gain: Tensor
    multiplies: bool


@dataclass(frozen=True, slots=True, eq=False)
class InputGain:
    """``y = W (gain * x) + b`` at a linear site; ``gain`` is ``[in]``. Additions still read x."""

    site: str
    gain: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """``y = W T(x) + b`` with T block-diagonal, at a linear site: block k of x, a row, times ``blocks[k]``.

    At an embedding it is ``y <- T(y)``. ``blocks`` is ``[count, size, size]`` with ``count * size`` the width of what is
    turned. Not necessarily orthogonal.
    """

    site: str
    blocks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """``y <- own * y + other * y[partner]`` on the backbone's own output, before additions: a rotation of pairs.

    ``own``, ``other`` ``[out]``; ``partner`` int64 ``[out]``.
    """

    site: str
    own: Tensor
    other: Tensor
    partner: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DenseDiff:
    """The weight is ``matrix`` more: ``y += matrix x`` at a linear site, where ``matrix`` is ``[out, in]``.

    At an embedding it is ``[rows, width]``, at a norm ``[n]``: what the norm gives more with so much more weight is added.
    """

    site: str
    matrix: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SparseDiff:
    """``y += S x`` at a linear site; S has ``values[k]`` at (``rows[k]``, ``columns[k]``), repeated places add.

    ``rows`` (output) and ``columns`` (input) are int64 ``[count]``, ``values`` ``[count]``. At an embedding a row is a
    token's, and S is added to the table. (:mod:`deltas.sparse` has the form in which it is packed.)
    """

    site: str
    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """``y += (left kron right) x`` at a linear site; ``left`` ``[a, b]``, ``right`` ``[c, d]``, out = ac, in = bd."""

    site: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Override:
    """Absolute values in place of the backbone's own, at a linear, norm or embedding site.

    ``weight`` ``[out, in]`` (linear), ``[n]`` (norm) or ``[rows, width]`` (embedding); ``bias`` ``[out]`` or None for none.
    """

    site: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingRows:
    """Rows ``indices`` of an embedding are ``rows`` instead; int64 ``[n]``, ``[n, width]``."""

    site: str
    indices: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingLowRank:
    """``y += table[id] @ up`` at an embedding; ``table`` ``[rows, rank]``, ``up`` ``[rank, width]``."""

    site: str
    table: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class OutputRows:
    """Outputs ``indices`` of a linear use the weight rows ``rows`` instead (its bias stays); int64 ``[n]``, ``[n, in]``.

    The head's share of trained token embeddings that are tied to it.
    """

    site: str
    indices: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """``embeddings`` ``[n, hidden]`` put before a row's token embeddings; real tokens' positions shift by n.

    On a causal backbone this is constant, so the engine turns it into a :class:`KVPrefix` per layer, once.
    ``after_norm``: placed after an encoder's embedding norm (and its position embedding), else before them.
    """

    embeddings: Tensor
    after_norm: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class KVPrefix:
    """Keys and values ``[n, kv_heads, head_dim]`` of one layer, put before a row's own.

    ``shifts_positions``: whether the row's own tokens start at position n (else 0). ``shifts_keys``: whether only the
    keys' relative positions count the prefix, as AdapterHub's T5 does. ``gate``: one number for both, or one for the
    keys and one for the values, by which a row takes them; it reads what the attention reads. ``unbiased``: the layer
    has no relative position biases for the row, as in OpenDelta's T5.
    """

    site: str
    keys: Tensor
    values: Tensor
    shifts_positions: bool
    shifts_keys: bool = False
    gate: Gate | None = None
    unbiased: bool = False


class Pooling(StrEnum):
    """Which tokens of a row a head reads."""

    FIRST = "first"
    LAST = "last"
    MEAN = "mean"
    NONE = "none"  # every token


@dataclass(frozen=True, slots=True, eq=False)
class HeadLayer:
    """``activation(weight x + bias)``, then a layer norm with weight ``norm`` if there is one.

    ``weight`` ``[out, in]``, ``bias`` ``[out]`` or None, ``norm`` and ``norm_bias`` ``[out]`` or None.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Activation
    norm: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A task head on the last hidden states."""

    layers: tuple[HeadLayer, ...]
    pooling: Pooling
    labels: tuple[str, ...] | None = None


SitePatches = (
    LowRank
    | Shift
    | Gain
    | InputGain
    | Rotation
    | Mix
    | DenseDiff
    | SparseDiff
    | Kronecker
    | Override
    | EmbeddingRows
    | EmbeddingLowRank
    | OutputRows
    | GatedLowRank
    | GatedGain
    | Bottleneck
    | Fusion
    | Coupling
)
"""What changes one module's output, token by token."""

Patch = SitePatches | SoftPrompt | KVPrefix | Head

__all__ = [
    "Activation",
    "Affine",
    "BlockInput",
    "Bottleneck",
    "Coupling",
    "DenseDiff",
    "EmbeddingLowRank",
    "EmbeddingRows",
    "Fusion",
    "Gain",
    "Gate",
    "GatedGain",
    "GatedLowRank",
    "Head",
    "HeadLayer",
    "InputGain",
    "KVPrefix",
    "Kronecker",
    "LowRank",
    "Mix",
    "OutputRows",
    "Override",
    "Patch",
    "Pooling",
    "Rotation",
    "Shift",
    "SitePatches",
    "SoftPrompt",
    "SparseDiff",
]
