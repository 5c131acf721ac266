"""LoRA (Hu et al. 2022), rank-stabilised (Kalajdzievski 2023) and with magnitudes (DoRA, Liu et al. 2024).

Begins as PEFT's: A uniform within 1 / sqrt(in), B zero (at an embedding A zero, B normal), the magnitude the norms of
the weight's rows. DoRA's norms are constants in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tuned.base import Trained
from deltas.tuned.options import Option, count, flag, real
from deltas.tuned.targets import word
from deltas.weights import SiteWeights


class LoraTuning(Trained):
    """Low-rank additions."""

    name = "lora"
    learning_rate = 1e-3
    kinds = (SiteKind.LINEAR, SiteKind.EMBEDDING)
    where = "all linears of the layers"
    known = (
        Option("rank", 8, count(1, 1024), "rank of the factors"),
        Option("alpha", 16.0, real(0, 1e6, open_below=True), "the product is scaled by alpha / rank"),
        Option("rslora", False, flag, "scale by alpha / sqrt(rank) instead"),
        Option("dora", False, flag, "train the magnitude of each output too"),
    )

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return word("linears", spec)

    def start(
        self, options: Mapping[str, Any], sites: Sequence[Site], weights: SiteWeights, rng: torch.Generator, /
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        rank = options["rank"]
        for site in sites:
            down, up = torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank)
            if site.kind is SiteKind.EMBEDDING:
                up.normal_(generator=rng)
            else:
                bound = 1 / math.sqrt(site.in_features)
                down.uniform_(-bound, bound, generator=rng)
            found |= {f"{site.name}/A": down, f"{site.name}/B": up}
            if options["dora"]:
                weight = weights.weight(site)
                rows = weight.T if site.kind is SiteKind.EMBEDDING else weight
                found[f"{site.name}/magnitude"] = torch.linalg.vector_norm(rows, dim=1)
        return found

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        """Of any rank; B takes the difference between the stored scale and the job's."""
        found = super().resume(component, options)
        config = component.config
        if "init" in config or config.get("dora") == "adapterhub":
            raise UnsupportedDelta(
                f"a LoRA with {'init ' + config['init'] if 'init' in config else 'AdapterHub’s DoRA'} cannot be trained "
                "on from its file",
                field="init_from",
            )
        if options["dora"] != any(name.endswith("/magnitude") for name in found):
            raise UnsupportedDelta("dora must be what it is in init_from", field="dora")
        for name in component.sites():
            ratio = config.get("scales", {}).get(name, config["scale"]) / _scale(options)
            for scaled in (f"{name}/B", f"{name}/bias"):
                if scaled in found and ratio != 1:
                    found[scaled] = found[scaled] * ratio
        return found

    def config(self, options: Mapping[str, Any], _sites: Sequence[Site], /) -> dict[str, Any]:
        return {"scale": _scale(options)} | ({"dora": "peft"} if options["dora"] else {})


def _scale(options: Mapping[str, Any]) -> float:
    rank: int = options["rank"]
    return float(options["alpha"] / (math.sqrt(rank) if options["rslora"] else rank))
