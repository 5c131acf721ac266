"""Prefix tuning (Li & Liang, 2021): trained keys and values that every token of a row attends to.

Canonical tensors ``<site>/keys`` and ``<site>/values`` ``[n, kv_heads, head_dim]`` at KV sites, as they lie in the cache
(no rotary embedding is applied to them). Config ``{"shifts_positions": bool}``: whether a row's own tokens start at
position n, as PEFT has it, or at 0, as AdapterHub and OpenDelta do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, by_site, each_site, expect, only_keys
from deltas.methods.prompt import POSITIONS
from deltas.patches import KVPrefix, Patch
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights


class Prefix:
    """Keys and values before a row's own."""

    name = "prefix"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"shifts_positions"}))
        if type(config.get("shifts_positions")) is not bool:
            raise InvalidDelta("shifts_positions must be true or false", field="shifts_positions")
        return {"shifts_positions": config["shifts_positions"]}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        sites = by_site(outline.shapes, ("keys", "values"), (SiteKind.KV,), spec)
        for site, parameters in sites.items():
            expect(f"{site.name}/keys", parameters["keys"], (0, spec.kv_heads, spec.head_dim))
            length = parameters["keys"][0]
            expect(f"{site.name}/values", parameters["values"], (length, spec.kv_heads, spec.head_dim))
            if length >= spec.max_positions:
                raise InvalidDelta(
                    f"{length} virtual tokens leave no room in a context of {spec.max_positions}",
                    field=f"{site.name}/keys",
                )

    def claims(self, outline: Outline) -> frozenset[str]:
        return frozenset({POSITIONS}) if outline.config["shifts_positions"] else frozenset()

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        shifts = component.config["shifts_positions"]
        return [
            KVPrefix(site.name, tensors["keys"].contiguous(), tensors["values"].contiguous(), shifts)
            for site, tensors in each_site(component, weights.spec)
        ]
