"""Super-Tuning: trained numbers at the weight's largest (or smallest) entries, with a low-rank change beside them or
not.

Canonical tensors ``<site>/values`` ``[n]`` and ``<site>/indices`` int64 ``[n]`` into the flattened weight, or
without indices config ``{"largest": bool}``, which says which end of the entries by size they were; ``<site>/A``
``[r, in]`` and ``<site>/B`` ``[out, r]`` may be there, with ``"scale"``. (PEFT 0.21.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, check_indices, number, only_keys
from deltas.methods.fourierft import check_count
from deltas.methods.per_site import Loaded, Outlined, PerSite, truth
from deltas.patches import LowRank, Patch, SparseDiff
from deltas.sites import BackboneSpec


class Supertuning(PerSite):
    """Sparse changes where the weight is largest."""

    name = "supertuning"
    required = ("values",)
    optional = ("indices", "A", "B")
    integers = frozenset({"indices"})

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"largest", "scale"}))
        result: dict[str, Any] = {}
        if config.get("largest") is not None:
            result["largest"] = truth(config["largest"], "largest")
        if config.get("scale") is not None:
            result["scale"] = number(config["scale"], "scale")
        return result

    def check_site(self, here: Outlined) -> None:
        check_count(here, "values")
        if "indices" in here.shapes:
            here.expect("indices", here.shapes["values"][0])
        elif "largest" not in here.config:
            name = f"{here.site.name}/indices"
            raise InvalidDelta(f"missing tensor: {name}, and the config does not say which end", field=name)
        factors = [name for name in "AB" if name in here.shapes]
        if len(factors) == 1:
            name = f"{here.site.name}/{factors[0]}"
            raise InvalidDelta(f"{name!r} has no partner", field=name)
        if factors:
            rank = here.expect("A", 0, here.site.in_features)[0]
            here.expect("B", here.site.out_features, rank)
            if "scale" not in here.config:
                raise InvalidDelta("low-rank factors need a scale", field="scale")

    def check_values(self, component: Component, spec: BackboneSpec) -> None:
        for name, tensor in component.tensors.items():
            site, _, parameter = name.rpartition("/")
            if parameter in self.integers:
                check_indices(name, tensor, spec.sites[site].in_features * spec.sites[site].out_features)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        site, values = here.site, here["values"]
        if "indices" in here:
            places = here["indices"]
        else:
            sizes = here.weights.weight(site).abs().flatten()
            places = torch.topk(sizes, len(values), largest=here.config["largest"]).indices
        yield SparseDiff(site.name, places // site.in_features, places % site.in_features, values)
        if "A" in here:
            yield LowRank(site.name, here["A"], (here["B"].T * here.config["scale"]).contiguous())
