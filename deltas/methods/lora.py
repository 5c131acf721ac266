"""LoRA: ``y += s B (A x)`` at linear sites.

Canonical tensors ``<site>/A`` ``[r, in]`` and ``<site>/B`` ``[out, r]``; config ``{"scale": s}``, with
``"scales": {site: s}`` for the sites whose scale differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, by_site, expect, number, only_keys
from deltas.patches import LowRank, Patch
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights


class Lora:
    """Low-rank additions to linear layers."""

    name = "lora"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "scales"}))
        scale = number(config.get("scale"), "scale")
        exceptions = config.get("scales", {})
        if not isinstance(exceptions, Mapping):
            raise InvalidDelta("scales must be an object", field="scales")
        scales = {str(site): number(value, "scales") for site, value in exceptions.items()}
        scales = {site: value for site, value in scales.items() if value != scale}
        return {"scale": scale, "scales": scales} if scales else {"scale": scale}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        sites = by_site(outline.shapes, ("A", "B"), (SiteKind.LINEAR,), spec)
        for site, parameters in sites.items():
            if site.name == "head":
                raise UnsupportedDelta(
                    "low-rank deltas of the output head are not served yet", field="head/A"
                )
            expect(f"{site.name}/A", parameters["A"], (0, site.in_features))
            rank = parameters["A"][0]
            expect(f"{site.name}/B", parameters["B"], (site.out_features, rank))
        named = {site.name for site in sites}
        for name in outline.config.get("scales", {}):
            if name not in named:
                raise InvalidDelta(f"scales names {name!r}, where there are no tensors", field="scales")

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        default, scales = component.config["scale"], component.config.get("scales", {})
        present = set(component.sites())
        patches: list[Patch] = []
        for site in weights.spec.of_kind(SiteKind.LINEAR):
            if site.name not in present:
                continue
            tensors = component.at(site.name)
            up = tensors["B"].to(torch.float32).T * scales.get(site.name, default)
            down = tensors["A"].to(torch.float32)
            patches.append(LowRank(site.name, down.contiguous(), up.contiguous()))
        return patches
