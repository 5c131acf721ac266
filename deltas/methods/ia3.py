"""IA3 (Liu et al., 2022): learned gains of a linear's output or input.

Canonical tensors ``<site>/gain`` ``[out]``: y = gain * (W x + b), and ``<site>/input_gain`` ``[in]``: y = W (gain * x) + b.
Config ``{}``, or ``{"scale": s}`` where every output gain is s times its tensor. Gains of two deltas at one site multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.methods.base import Outline, by_site, each_site, expect, number, only_keys
from deltas.patches import Gain, InputGain, Patch
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights


class IA3:
    """Gains."""

    name = "ia3"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale"}))
        scale = number(config.get("scale", 1.0), "scale")
        return {} if scale == 1.0 else {"scale": scale}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        sites = by_site(outline.shapes, (), (SiteKind.LINEAR,), spec, optional=("gain", "input_gain"))
        for site, parameters in sites.items():
            if len(parameters) == 2:
                raise UnsupportedDelta(
                    f"{site.name} has a gain and an input_gain; one is served", field=f"{site.name}/gain"
                )
            if "gain" in parameters:
                expect(f"{site.name}/gain", parameters["gain"], (site.out_features,))
            else:
                expect(f"{site.name}/input_gain", parameters["input_gain"], (site.in_features,))

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        patches: list[Patch] = []
        for site, tensors in each_site(component, weights.spec):
            if "gain" in tensors:
                gain = (tensors["gain"] * component.config.get("scale", 1.0)).contiguous()
                patches.append(Gain(site.name, gain, multiplies=True))
            else:
                patches.append(InputGain(site.name, tensors["input_gain"].contiguous()))
        return patches
