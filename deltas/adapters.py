"""Patches with an inside: bottlenecks and what adapters' library builds of them, gates, fusions, couplings.

See :mod:`deltas.patches`, which has them all.
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
    NORMED = "normed"  # LN(h + i), by the norm that follows on post-norm backbones
    INNER = "inner"  # what the sublayer itself read: on pre-norm backbones the normed residual


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """``weight``, ``bias`` of a linear ``[out, in]``, ``[out]`` or of a layer norm ``[n]``, ``[n]`` (epsilon 1e-5)."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """How much of a change a row takes: the mean over its own tokens z of ``sigmoid(weight z + bias)``.

    ``weight`` ``[n, in]``, ``bias`` ``[n]`` give n numbers per row. A row's tokens must all be there, so a gate has no
    place where tokens come one after another.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GatedLowRank:
    """A :class:`LowRank` that a row takes by its gate (of one number): ``y += gate(x) up^T (down x)``."""

    site: str
    down: Tensor
    up: Tensor
    gate: Gate


@dataclass(frozen=True, slots=True, eq=False)
class GatedGain:
    """``y <- (rest + gate(x) gain) * y`` on the backbone's own output; ``gain`` is ``[out]``, the gate of one number."""

    site: str
    gain: Tensor
    gate: Gate
    rest: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """``h += up^T f(down z + down_bias) + up_bias`` at a block site, ``z`` by ``reads``; at a norm's output too.

    ``down`` ``[width, hidden]``, ``up`` ``[width, hidden]``, ``down_bias`` ``[width]``, ``up_bias`` ``[hidden]``.
    Several at one site apply in order: each reads the ``h`` that the one before it left.

    With the options, u being what is added above: ``norm_before`` is applied to z for ``down``; ``gate`` (of one
    number, reading z) multiplies u; the result is ``onto + norm_after(u)``, or ``norm_after(onto + u)`` where
    ``norm_around``; ``share`` is how far towards it h goes.
    """

    site: str
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: Activation
    reads: BlockInput
    norm_before: Affine | None = None
    norm_after: Affine | None = None
    norm_around: bool = False
    gate: Gate | None = None
    onto: BlockInput = BlockInput.OUTPUT
    share: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether none of the options is used, so that the kernels can apply it."""
        extras = (self.norm_before, self.norm_after, self.gate)
        return all(extra is None for extra in extras) and self.onto is BlockInput.OUTPUT and self.share == 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """AdapterFusion at a block site: each token mixes several bottlenecks by attention over their outputs.

    With u_j what bottleneck j adds (their ``reads`` are one): keys are ``key u_j``, values ``value u_j``, the query
    is ``query z`` with z by ``query_reads``, and h becomes ``onto + sum_j softmax_j(query . keys) values_j``. Where
    ``around``, keys and values are made of ``onto + u_j`` and ``onto`` is not added again. ``share`` as above.
    """

    site: str
    parts: tuple[Bottleneck, ...]
    query: Affine | None
    key: Affine | None
    value: Affine | None
    query_reads: BlockInput
    onto: BlockInput
    around: bool = False
    share: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """An invertible adapter on an embedding's (or its norm's) output, cut into halves a and b (NICE).

    ``a += F(b)``, then ``b += G(a)``, where ``F(x) = up f(down x)`` with ``f_down``, ``f_up``, and G likewise. ``share``
    as in :class:`Bottleneck`.
    """

    site: str
    f_down: Affine
    f_up: Affine
    g_down: Affine
    g_up: Affine
    activation: Activation
    share: float = 1.0
