"""Methods: how deltas are made, and how each lowers to patches. One file per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from deltas.compose import combine, scaled
from deltas.delta import Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.adalora import AdaLora
from deltas.methods.base import HasIntegers, Method, Outline
from deltas.methods.bitfit import BitFit
from deltas.methods.boft import Boft
from deltas.methods.bottleneck import BottleneckAdapter
from deltas.methods.c3a import C3a
from deltas.methods.compacter import Compacter
from deltas.methods.composed_lora import DenseVera, MtlLora
from deltas.methods.deft import Deft
from deltas.methods.delora import DeLora
from deltas.methods.dense import Dense
from deltas.methods.diff_pruning import DiffPruning
from deltas.methods.fourierft import FourierFt
from deltas.methods.fusion import AdapterFusion
from deltas.methods.gated import GatedIA3, GatedLora
from deltas.methods.glora import GLora
from deltas.methods.gralora import GraLora
from deltas.methods.head import HeadMethod
from deltas.methods.hira import Hira
from deltas.methods.hra import Hra
from deltas.methods.ia3 import IA3
from deltas.methods.intrinsic import Intrinsic
from deltas.methods.invertible import Invertible
from deltas.methods.loha import LoHa
from deltas.methods.lokr import LoKr
from deltas.methods.lora import Lora
from deltas.methods.low_rank_adapter import LowRankAdapter
from deltas.methods.masking import Masking
from deltas.methods.miss import Miss
from deltas.methods.oft import Oft
from deltas.methods.opendelta_prefix import OpenDeltaPrefix
from deltas.methods.override import LayerNorm, OverrideMethod
from deltas.methods.packed_prefix import PackedPrefix
from deltas.methods.peanut import Peanut
from deltas.methods.prefix import Prefix
from deltas.methods.prompt import Prompt
from deltas.methods.randlora import RandLora
from deltas.methods.road import Road
from deltas.methods.shira import Shira
from deltas.methods.supertuning import Supertuning
from deltas.methods.tinylora import TinyLora
from deltas.methods.tokens import Tokens
from deltas.methods.unilora import UniLora
from deltas.methods.vblora import VbLora
from deltas.methods.vera import Vera
from deltas.methods.waveft import WaveFt
from deltas.patches import Patch
from deltas.sites import BackboneSpec
from deltas.tensors import surely_finite, tensors_of
from deltas.weights import SiteWeights, Source

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        AdaLora(),
        BitFit(),
        Boft(),
        BottleneckAdapter(),
        PackedPrefix(),
        MtlLora(),
        Invertible(),
        GatedLora(),
        GatedIA3(),
        DenseVera(),
        Compacter(),
        AdapterFusion(),
        C3a(),
        Deft(),
        DeLora(),
        Dense(),
        DiffPruning(),
        FourierFt(),
        GLora(),
        GraLora(),
        HeadMethod(),
        Hira(),
        Hra(),
        IA3(),
        Intrinsic(),
        LayerNorm(),
        LoHa(),
        LoKr(),
        Lora(),
        LowRankAdapter(),
        Masking(),
        Miss(),
        Oft(),
        OpenDeltaPrefix(),
        OverrideMethod(),
        Peanut(),
        Prefix(),
        Prompt(),
        RandLora(),
        Road(),
        Shira(),
        Supertuning(),
        TinyLora(),
        Tokens(),
        UniLora(),
        VbLora(),
        Vera(),
        WaveFt(),
    )
}


def method(name: str) -> Method:
    """The method of that name. Raises :class:`UnsupportedDelta`, listing the methods there are."""
    if name not in METHODS:
        raise UnsupportedDelta(
            f"method {ascii(name)[:200]} is not served; served: {', '.join(sorted(METHODS))}", field="method"
        )
    return METHODS[name]


def check_outlines(outlines: Sequence[Outline], spec: BackboneSpec) -> None:
    """Refuse components that do not fit the backbone, or that have no agreed meaning together."""
    for outline in outlines:
        check_outline(outline, spec)
    check_together(outlines)


def check_outline(outline: Outline, spec: BackboneSpec) -> None:
    """Refuse a component that does not fit the backbone."""
    method(outline.method).check(outline, spec)
    for name in outline.shapes:
        site = spec.sites.get(name.rpartition("/")[0])
        if site is not None and site.refused:
            raise UnsupportedDelta(f"{name!r}: {site.refused}", field=name)


def check_together(outlines: Sequence[Outline]) -> None:
    """Refuse no components at all, and those that claim the same thing."""
    if not outlines:
        raise InvalidDelta("a delta needs at least one component", field="components")
    claimed: set[str] = set()
    for outline in outlines:
        for claim in sorted(method(outline.method).claims(outline)):
            if claim in claimed:
                raise UnsupportedDelta(f"two components change {claim}", field="components")
            claimed.add(claim)


def check(delta: Delta, spec: BackboneSpec) -> None:
    """Refuse a delta that does not fit this backbone; looks at configs and shapes only.

    Raises :class:`~deltas.errors.InvalidDelta` or :class:`~deltas.errors.UnsupportedDelta`, ``field`` naming
    the canonical tensor or config key.
    """
    check_outlines(_outlines(delta), spec)


def integers(name: str) -> frozenset[str]:
    """The parameters of that method that are integers; every other one is a float."""
    found = method(name)
    return found.integers if isinstance(found, HasIntegers) else frozenset()


def check_values(delta: Delta, spec: BackboneSpec) -> None:
    """Refuse a loaded delta whose indices point outside the backbone; :class:`~deltas.errors.InvalidDelta`."""
    for component in delta.components:
        served = method(component.method)
        if isinstance(served, HasIntegers):
            served.check_values(component, spec)


def rank(delta: Delta) -> int | None:
    """The largest rank or bottleneck width in the delta, None where no method has one."""
    ranks = [method(outline.method).rank(outline) for outline in _outlines(delta)]
    return max((found for found in ranks if found is not None), default=None)


def lower(delta: Delta, spec: BackboneSpec, source: Source | None = None) -> list[Patch]:
    """The delta as patches in float32, its components joined by the rules of ``compose.py``.

    ``source`` gives the backbone's own tensors, for methods that depend on them. Raises :class:`InvalidDelta` where
    folding a scale overflows float32, :class:`UnsupportedDelta` where the weights are needed and not at hand, and
    all that :func:`check` raises.
    """
    return lower_sum([(delta, 1.0)], spec, source)


def lower_sum(
    parts: Sequence[tuple[Delta, float]], spec: BackboneSpec, source: Source | None = None
) -> list[Patch]:
    """Several deltas, each with its weight, as one list of patches. Raises what :func:`lower` does."""
    weights = SiteWeights(spec, source)
    lowered: list[list[Patch]] = []
    for delta, weight in parts:
        check(delta, spec)
        for component in delta.components:
            patches = METHODS[component.method].lower(component, weights)
            lowered.append(scaled(patches, weight, weights))
    joined = combine(lowered)
    if not surely_finite(tensor for tensor in tensors_of(joined) if tensor.is_floating_point()):
        for patch in joined:
            _check_finite(patch)
    return joined


def _check_finite(patch: Patch) -> None:
    for item in fields(patch):
        value = getattr(patch, item.name)
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            where = getattr(patch, "site", "embeddings")
            raise InvalidDelta(f"{item.name} at {where} overflows float32 once scaled", field=where)


def _outlines(delta: Delta) -> list[Outline]:
    return [
        Outline(c.method, c.config, {name: tuple(t.shape) for name, t in c.tensors.items()})
        for c in delta.components
    ]


__all__ = [
    "METHODS",
    "Method",
    "Outline",
    "check",
    "check_outline",
    "check_outlines",
    "check_together",
    "check_values",
    "integers",
    "lower",
    "lower_sum",
    "method",
    "rank",
]
