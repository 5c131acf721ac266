"""Masking: a binary mask over the backbone's weights, as the places of the entries that become zero (Zhao et al. 2020).

Canonical tensors ``<site>/indices`` int64 ``[2, n]``, rows and columns in the weight ``[out, in]`` of a linear or
``[rows, width]`` of an embedding (``[1, n]`` at a norm); for biases ``<site>/bias_indices`` ``[1, n]``. No config.
What is lowered is the negated weight there, so it needs the backbone's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, by_site, each_site, only_keys
from deltas.methods.sparse import INTEGERS, KINDS, bias_change, check_entries, check_places, weight_change
from deltas.patches import Patch
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights


class Masking:
    """Entries of the backbone that are zero."""

    name = "masking"
    integers = INTEGERS

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset())
        return {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        known = ("indices", "bias_indices")
        sites = by_site(outline.shapes, (), KINDS, spec, optional=known)
        fused = {site.path: site.name for site in sites if not site.part}
        for site, shapes in sites.items():
            if site.part and site.path in fused:
                name = f"{site.name}/{next(iter(shapes))}"
                raise InvalidDelta(
                    f"{name!r}: {fused[site.path]}, of which it is part, has a mask", field=name
                )
            for name in shapes:
                check_entries(site, shapes, name)
            if "bias_indices" in shapes and not site.bias:
                name = f"{site.name}/bias_indices"
                raise InvalidDelta(f"{name!r}: the backbone has no bias there", field=name)

    def check_values(self, component: Component, spec: BackboneSpec) -> None:
        check_places(component, spec)

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset({"the mask"})  # an entry taken away twice is the weight negated

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        patches: list[Patch] = []
        for site, tensors in each_site(component, weights.spec):
            if "indices" in tensors:
                places = _distinct(tensors["indices"], site.weight_shape)
                patches.append(weight_change(site, places, -weights.weight(site)[tuple(places)]))
            if "bias_indices" in tensors:
                places = torch.unique(tensors["bias_indices"])[None]
                bias = weights.bias(site)
                if bias is None:
                    raise UnsupportedDelta(
                        f"{site.name}: the backbone's bias is not at hand", field=site.name
                    )
                patches.append(bias_change(site, places, -bias[places[0]]))
        return patches


def _distinct(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Every place once, in order: ``[dimensions, n]``."""
    flat = places[0] if len(shape) == 1 else places[0] * shape[1] + places[1]
    return torch.stack(torch.unravel_index(torch.unique(flat), shape))
