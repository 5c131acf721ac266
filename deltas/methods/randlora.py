"""RandLoRA: ``y += s dW x`` with dW a sum of random low-rank matrices whose scales are trained; of full rank, so kept
dense.

With ``min`` and ``max`` the smaller and larger of ``in`` and ``out``: canonical tensors ``<site>/lambda`` ``[r,
n]`` and ``<site>/gamma`` ``[n, min]``, with ``n = ceil(min / r)``; ``A`` ``[r, 1, widest min]`` and ``B``
``[tallest max, widest n, r]``, which all sites share, or config ``{"seed": k}``, by which PEFT draws them, with
``"sparsity": "none" | "sparse" | "very sparse"``; and ``"scale"``. (Albert et al. 2025, "RandLoRA"; PEFT.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, expect, number, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, Shape, whole
from deltas.patches import DenseDiff, Patch
from deltas.sites import Site
from deltas.weights import SiteWeights

_SPARSITIES = ("none", "sparse", "very sparse")


class RandLora(PerSite):
    """Sums of random low-rank matrices."""

    name = "randlora"
    required = ("lambda", "gamma")
    shared = ("A", "B")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "seed", "sparsity"}))
        result: dict[str, Any] = {"scale": number(config.get("scale"), "scale")}
        if config.get("seed") is None:
            if "sparsity" in config:
                raise InvalidDelta("sparsity says how a seed draws, and there is no seed", field="sparsity")
            return result
        sparsity = config.get("sparsity", "none")
        if sparsity not in _SPARSITIES:
            raise InvalidDelta(f"sparsity must be one of {', '.join(_SPARSITIES)}", field="sparsity")
        return result | {"seed": whole(config["seed"], "seed"), "sparsity": sparsity}

    def check_shared(
        self, shared: Mapping[str, Shape], sites: list[Outlined], config: Mapping[str, Any]
    ) -> None:
        rank = sites[0].expect("lambda", 0, 0)[0]
        for here in sites:
            here.expect("lambda", rank, 0)
        if "seed" in config:
            if shared:
                raise InvalidDelta("the bases are given twice, as tensors and as a seed", field="seed")
            return
        for name in self.shared:
            if name not in shared:
                raise InvalidDelta(f"missing tensor: {name}, and there is no seed", field=name)
        expect("A", shared["A"], (rank, 1, 0))
        expect("B", shared["B"], (0, 0, rank))
        needed = [_sizes(here.site) for here in sites]
        least = (max(low for low, _ in needed), max(high for _, high in needed))
        bases = max(math.ceil(low / rank) for low, _ in needed)
        if shared["A"][2] < least[0] or shared["B"][0] < least[1] or shared["B"][1] < bases:
            raise InvalidDelta("the bases A and B are smaller than the largest site needs", field="B")

    def check_site(self, here: Outlined) -> None:
        least, _ = _sizes(here.site)
        rank = here.shared["A"][0] if here.shared else here.expect("lambda", 0, 0)[0]
        bases = math.ceil(least / rank)
        here.expect("lambda", rank, bases)
        here.expect("gamma", bases, least)

    def rank(self, outline: Outline) -> int | None:
        sizes = (shape[0] for name, shape in outline.shapes.items() if name.endswith("/lambda"))
        return max(sizes, default=None)

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        if "seed" in component.config:
            component = Component(
                component.method, component.config, {**component.tensors, **_drawn(component, weights)}
            )
        return super().lower(component, weights)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        least, most = _sizes(here.site)
        bases = here["gamma"].shape[0]
        small = here["lambda"][:, :, None] * here.shared["A"][:, :, :least] * here["gamma"]  # [r, n, min]
        large = here.shared["B"][:most, :bases].flatten(1)  # [max, n r], with n the slower index
        # PEFT lays the two out differently, the small one with r the slower index, and multiplies as they lie
        matrix = large @ small.flatten(end_dim=1)
        if least != here.site.in_features:
            matrix = matrix.T
        yield DenseDiff(here.site.name, (matrix * here.config["scale"]).contiguous())


def _sizes(site: Site) -> tuple[int, int]:
    low, high = sorted((site.in_features, site.out_features))
    return low, high


def _drawn(component: Component, weights: SiteWeights) -> dict[str, Tensor]:
    """A and B as PEFT draws them for the sites that are there, by one generator on the CPU, A first."""
    sites = [weights.spec.sites[name] for name in component.sites()]
    rank = component.tensors[f"{sites[0].name}/lambda"].shape[0]
    widths = (max(s.in_features for s in sites), max(s.out_features for s in sites))
    least, most = min(widths), max(widths)
    bases = math.ceil(least / rank)
    generator = torch.Generator().manual_seed(component.config["seed"])
    sparsity = component.config["sparsity"]
    if sparsity != "none":
        third = 3.0 if sparsity == "sparse" else math.sqrt(least)
        drawn = [torch.rand(shape, generator=generator) for shape in ((rank, 1, least), (most, bases, rank))]
        signs = [(x > 1 - 1 / (2 * third)).float() - (x < 1 / (2 * third)).float() for x in drawn]
        first, second = (x / x.std() for x in signs)
        return {"A": first, "B": second}

    def uniform(*shape: int) -> Tensor:
        # bfloat16, as where PEFT runs on hardware that knows it
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    first = uniform(rank, 1, least)
    second = torch.cat([uniform(most, 1, rank) for _ in range(bases)], dim=1)
    return {"A": first / first.std(), "B": second / second.std()}
