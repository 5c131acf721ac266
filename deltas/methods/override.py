"""Absolute values in place of a module's own: selected modules, the last layer, trained biases, norms, embeddings.

Canonical tensors ``<site>/weight`` (``[out, in]`` at a linear, ``[n]`` at a norm, ``[rows, width]`` at an embedding) and
``<site>/bias`` ``[out]``; either may be missing, and then the backbone's own stays. No config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.methods.base import Outline, by_site, each_site, expect, only_keys
from deltas.patches import Override, Patch, Shift
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights


class OverrideMethod:
    """Absolute values (``modules_to_save`` and ``bias`` in PEFT, ``unfrozen_modules`` in OpenDelta)."""

    name = "override"
    kinds: tuple[SiteKind, ...] = (SiteKind.LINEAR, SiteKind.NORM, SiteKind.EMBEDDING)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset())
        return {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        sites = by_site(outline.shapes, (), self.kinds, spec, optional=("weight", "bias"))
        for site, parameters in sites.items():
            if "weight" in parameters:
                expect(f"{site.name}/weight", parameters["weight"], _shape(site))
            if "bias" in parameters:
                expect(f"{site.name}/bias", parameters["bias"], (site.out_features,))

    def claims(self, outline: Outline) -> frozenset[str]:
        return frozenset(f"the values of {name.rpartition('/')[0]}" for name in outline.shapes)

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        return [_patch(site, tensors, weights) for site, tensors in each_site(component, weights.spec)]


class LayerNorm(OverrideMethod):
    """Tuning of the norms alone (Zhao et al., 2023)."""

    name = "ln"
    kinds = (SiteKind.NORM,)


def _shape(site: Site) -> tuple[int, ...]:
    if site.kind is SiteKind.NORM:
        return (site.out_features,)
    if site.kind is SiteKind.EMBEDDING:
        return (site.in_features, site.out_features)
    return (site.out_features, site.in_features)


def _patch(site: Site, tensors: Mapping[str, Tensor], weights: SiteWeights) -> Patch:
    own = weights.bias(site) if site.bias or site.kind is SiteKind.NORM else None
    bias = tensors.get("bias")
    if "weight" not in tensors and bias is not None and site.kind is not SiteKind.NORM:
        return Shift(site.name, (bias if own is None else bias - own).contiguous())
    weight = tensors.get("weight")
    if weight is None:
        weight = weights.weight(site)
    whole = own if bias is None else bias
    return Override(site.name, weight.contiguous(), None if whole is None else whole.to(torch.float32))
