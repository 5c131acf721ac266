"""SHiRA: ``y += s S x`` with a sparse S of high rank at linear sites (Bhardwaj et al. 2024; PEFT).

Canonical tensors ``<site>/indices`` int64 ``[2, n]`` (rows and columns of the weight ``[out, in]``) and ``<site>/values``
``[n]``, which are PEFT's ``shira_indices`` and ``shira_weight``; config ``{"scale": s}`` with ``"scales"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltas.delta import Component
from deltas.methods.base import only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, scale_at, scales
from deltas.methods.sparse import INTEGERS, check_entries, check_places, weight_change
from deltas.patches import Patch
from deltas.sites import BackboneSpec


class Shira(PerSite):
    """Sparse additions to linears."""

    name = "shira"
    required = ("indices", "values")
    integers = INTEGERS

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "scales"}))
        return scales(config)

    def check_site(self, here: Outlined) -> None:
        check_entries(here.site, here.shapes, "indices", "values")

    def check_values(self, component: Component, spec: BackboneSpec) -> None:
        check_places(component, spec)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        yield weight_change(here.site, here["indices"], here["values"] * scale_at(here))
