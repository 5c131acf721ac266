"""Methods: how deltas are made, and how each lowers to patches. One file per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from deltas.compose import combine, weighted
from deltas.delta import Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Method, Outline
from deltas.methods.bitfit import BitFit
from deltas.methods.bottleneck import BottleneckAdapter
from deltas.methods.lora import Lora
from deltas.methods.prompt import Prompt
from deltas.patches import Patch
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights, Source

METHODS: Mapping[str, Method] = {
    method.name: method for method in (Lora(), BottleneckAdapter(), BitFit(), Prompt())
}


def method(name: str) -> Method:
    """The method of that name. Raises :class:`UnsupportedDelta`, listing the methods there are."""
    if name not in METHODS:
        raise UnsupportedDelta(
            f"method {name!r} is not served; served: {', '.join(sorted(METHODS))}", field="method"
        )
    return METHODS[name]


def check_outlines(outlines: Sequence[Outline], spec: BackboneSpec) -> None:
    """Refuse components that do not fit the backbone, or that have no agreed meaning together."""
    if not outlines:
        raise InvalidDelta("a delta needs at least one component", field="components")
    claimed: set[str] = set()
    for outline in outlines:
        served = method(outline.method)
        served.check(outline, spec)
        for claim in sorted(served.claims(outline)):
            if claim in claimed:
                raise UnsupportedDelta(f"two components change {claim}", field="components")
            claimed.add(claim)


def check(delta: Delta, spec: BackboneSpec) -> None:
    """Refuse a delta that does not fit this backbone; looks at configs and shapes only.

    Raises :class:`~deltas.errors.InvalidDelta` or :class:`~deltas.errors.UnsupportedDelta`, ``field`` naming
    the canonical tensor or config key.
    """
    check_outlines(_outlines(delta), spec)


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
            lowered.append([weighted(patch, weight, weights) for patch in patches])
    joined = combine(lowered)
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


__all__ = ["METHODS", "Method", "Outline", "check", "check_outlines", "lower", "lower_sum", "method", "rank"]
