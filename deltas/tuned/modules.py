"""Whole modules: those of the last layer, or those that a job names; kept as differences, which sum with other deltas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tuned.base import Trained
from deltas.weights import SiteWeights

_LAYER = re.compile(r"(?P<stack>.*)layers\.(?P<index>\d+)\.")


class ModuleTuning(Trained):
    """Weights, and biases where the backbone has some, of chosen modules. Begins at no difference."""

    name = "selective_module"
    stored = "dense"
    learning_rate = 1e-4
    kinds: tuple[SiteKind, ...] = (SiteKind.LINEAR, SiteKind.NORM, SiteKind.EMBEDDING)
    where = "none: a job names them"

    def usual(self, _spec: BackboneSpec, /) -> list[Site]:
        raise InvalidDelta(f"{self.name} trains the modules that targets name: name some", field="targets")

    def start(
        self,
        _options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        _rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in sites:
            found[f"{site.name}/matrix"] = torch.zeros(site.weight_shape)
            if site.bias:
                found[f"{site.name}/beta"] = torch.zeros(site.out_features)
        return found


class LastLayerTuning(ModuleTuning):
    """The last layer's modules."""

    name = "last_layer"
    where = "the linears and norms of the last layer (of each stack)"

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        inside = [
            (match["stack"], int(match["index"]), site)
            for site in spec.of_kind(SiteKind.LINEAR, SiteKind.NORM)
            if not site.part and not site.refused
            for match in [_LAYER.match(site.name)]
            if match is not None
        ]
        last = {stack: max(index for other, index, _ in inside if other == stack) for stack, _, _ in inside}
        return [site for stack, index, site in inside if index == last[stack]]
