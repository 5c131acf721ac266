"""VeRA and PVeRA: ``y += b * B[:out] (d * (A[:, :in] x))`` with random A and B that all sites share; b and d are
trained.

Canonical tensors ``<site>/b`` ``[out]``, ``<site>/d`` ``[r]``, and ``A`` ``[r, widest in]``, ``B`` ``[widest out,
r]``; or, without A and B, config ``{"seed": n}``, from which PEFT draws them for the sites that are there. With
``"probabilistic"`` (PVeRA) A and d have 2r rows, of which the first r give the mean, all that evaluation uses.
(Kopiczko et al. 2024, "VeRA"; PEFT 0.21.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, expect, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, Shape, truth, whole
from deltas.patches import LowRank, Patch
from deltas.weights import SiteWeights


class Vera(PerSite):
    """Low-rank additions whose factors are random and shared."""

    name = "vera"
    required = ("b", "d")
    shared = ("A", "B")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"seed", "probabilistic"}))
        result: dict[str, Any] = {}
        if config.get("seed") is not None:
            result["seed"] = whole(config["seed"], "seed")
        if truth(config.get("probabilistic", False), "probabilistic"):
            result["probabilistic"] = True
        return result

    def check_shared(
        self, shared: Mapping[str, Shape], sites: list[Outlined], config: Mapping[str, Any]
    ) -> None:
        first = sites[0]
        rows = first.expect("d", 0)[0]
        if config.get("probabilistic") and rows % 2:
            raise first.refuse("d", "it holds means and variances, so an even number")
        for here in sites:
            here.expect("d", rows)
        wide, tall = _sizes(sites)
        if "seed" in config:
            if shared:
                raise InvalidDelta("the projections are given twice, as tensors and as a seed", field="seed")
            return
        for name in self.shared:
            if name not in shared:
                raise InvalidDelta(f"missing tensor: {name}, and there is no seed", field=name)
        expect("A", shared["A"], (rows, 0))
        expect("B", shared["B"], (0, rows // 2 if config.get("probabilistic") else rows))
        for name, size, least in (("A", shared["A"][1], wide), ("B", shared["B"][0], tall)):
            if size < least:
                raise InvalidDelta(f"{name} is {size} wide, the widest site needs {least}", field=name)

    def check_site(self, here: Outlined) -> None:
        here.expect("b", here.site.out_features)
        expected = here.shared["A"][0] if here.shared else 0
        here.expect("d", expected)

    def rank(self, outline: Outline) -> int | None:
        half = 2 if outline.config.get("probabilistic") else 1
        sizes = (shape[0] // half for name, shape in outline.shapes.items() if name.endswith("/d"))
        return max(sizes, default=None)

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        if "seed" in component.config:
            component = Component(
                component.method, component.config, {**component.tensors, **_drawn(component, weights)}
            )
        return super().lower(component, weights)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        rank = here.shared["B"].shape[1]
        down = here["d"][:rank, None] * here.shared["A"][:rank, : here.site.in_features]
        up = (here["b"][:, None] * here.shared["B"][: here.site.out_features]).T
        yield LowRank(here.site.name, down.contiguous(), up.contiguous())


def _sizes(sites: Iterable[Outlined]) -> tuple[int, int]:
    """The widest input and the widest output."""
    every = [here.site for here in sites]
    return max(site.in_features for site in every), max(site.out_features for site in every)


def _drawn(component: Component, weights: SiteWeights) -> dict[str, Tensor]:
    """A and B as PEFT draws them: Kaiming uniform, A first, by one generator on the CPU."""
    sites = [weights.spec.sites[name] for name in component.sites()]
    wide, tall = max(s.in_features for s in sites), max(s.out_features for s in sites)
    rows = component.tensors[f"{sites[0].name}/d"].shape[0]
    rank = rows // 2 if component.config.get("probabilistic") else rows
    generator = torch.Generator().manual_seed(component.config["seed"])
    return {
        "A": torch.nn.init.kaiming_uniform_(torch.empty(rows, wide), generator=generator),
        "B": torch.nn.init.kaiming_uniform_(torch.empty(tall, rank), generator=generator),
    }
