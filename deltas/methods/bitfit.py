"""BitFit: ``y += beta`` at linear and norm sites, also where the backbone has no bias.

Canonical tensors ``<site>/beta`` ``[out]``; no config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltas.delta import Component
from deltas.methods.base import Outline, by_site, expect, only_keys
from deltas.patches import Patch, Shift
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights

_KINDS = (SiteKind.LINEAR, SiteKind.NORM)


class BitFit:
    """Bias shifts."""

    name = "bitfit"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset())
        return {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        for site, parameters in by_site(outline.shapes, ("beta",), _KINDS, spec).items():
            expect(f"{site.name}/beta", parameters["beta"], (site.out_features,))

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        present = set(component.sites())
        return [
            Shift(site.name, component.at(site.name)["beta"].to(torch.float32).contiguous())
            for site in weights.spec.of_kind(*_KINDS)
            if site.name in present
        ]
