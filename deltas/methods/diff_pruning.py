"""Diff pruning: ``W + D`` with few entries of D different from zero (Guo et al. 2021).

Canonical tensors ``<site>/indices`` int64 ``[2, n]``, rows and columns in the weight ``[out, in]`` of a linear or
``[rows, width]`` of an embedding (``[1, n]`` at a norm), and ``<site>/values`` ``[n]``; for biases
``<site>/bias_indices`` ``[1, n]`` and ``<site>/bias_values`` ``[n]``. A place that is named twice gets the sum. No
config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, by_site, each_site, only_keys
from deltas.methods.sparse import INTEGERS, KINDS, bias_change, check_entries, check_places, weight_change
from deltas.patches import Patch
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights

_PAIRS = (("indices", "values"), ("bias_indices", "bias_values"))


class DiffPruning:
    """Sparse differences."""

    name = "diff_pruning"
    integers = INTEGERS

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset())
        return {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        known = tuple(name for pair in _PAIRS for name in pair)
        for site, shapes in by_site(outline.shapes, (), KINDS, spec, optional=known).items():
            for pair in _PAIRS:
                there = [name for name in pair if name in shapes]
                if len(there) == 1:
                    missing = f"{site.name}/{pair[1 - pair.index(there[0])]}"
                    raise InvalidDelta(f"missing tensors: {missing}", field=missing)
                if there:
                    check_entries(site, shapes, *pair)

    def check_values(self, component: Component, spec: BackboneSpec) -> None:
        check_places(component, spec)

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        patches: list[Patch] = []
        for site, tensors in each_site(component, weights.spec):
            if "indices" in tensors:
                patches.append(weight_change(site, tensors["indices"], tensors["values"]))
            if "bias_indices" in tensors:
                patches.append(bias_change(site, tensors["bias_indices"], tensors["bias_values"]))
        return patches
