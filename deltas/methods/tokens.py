"""Trained tokens: a few rows of the token embedding, and of a head that is tied to it, replaced.

Canonical tensors ``<site>/indices`` int64 ``[n]`` and ``<site>/rows`` ``[n, width]`` at an embedding or at the head. No
config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, by_site, check_indices, each_site, expect, only_keys
from deltas.patches import EmbeddingRows, OutputRows, Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights

HEAD = "head"


class Tokens:
    """Absolute rows of an embedding or of the head."""

    name = "tokens"
    integers = frozenset({"indices"})

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset())
        return {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        kinds = (SiteKind.EMBEDDING, SiteKind.LINEAR)
        for site, parameters in by_site(outline.shapes, ("indices", "rows"), kinds, spec).items():
            if site.kind is SiteKind.LINEAR and site.name != HEAD:
                raise InvalidDelta(
                    f"{site.name} is neither an embedding nor the head", field=f"{site.name}/rows"
                )
            expect(f"{site.name}/indices", parameters["indices"], (0,))
            width = site.out_features if site.kind is SiteKind.EMBEDDING else site.in_features
            expect(f"{site.name}/rows", parameters["rows"], (parameters["indices"][0], width))

    def check_values(self, component: Component, spec: BackboneSpec) -> None:
        for site, tensors in each_site(component, spec):
            name, indices = f"{site.name}/indices", tensors["indices"]
            check_indices(name, indices, _count(site))
            if len(set(indices.tolist())) != len(indices):
                raise InvalidDelta(f"{name!r} names a token twice", field=name)

    def claims(self, outline: Outline) -> frozenset[str]:
        return frozenset(f"the rows of {name.rpartition('/')[0]}" for name in outline.shapes)

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        patches: list[Patch] = []
        for site, tensors in each_site(component, weights.spec):
            kind = EmbeddingRows if site.kind is SiteKind.EMBEDDING else OutputRows
            patches.append(kind(site.name, tensors["indices"], tensors["rows"].contiguous()))
        return patches


def _count(site: Site) -> int:
    return site.in_features if site.kind is SiteKind.EMBEDDING else site.out_features
