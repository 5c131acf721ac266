"""Methods that train vectors: BitFit (Ben Zaken et al. 2022), IA3 (Liu et al. 2022) and the norms (Zhao et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tuned.base import Trained
from deltas.tuned.targets import leaves, word
from deltas.weights import SiteWeights


class BitFitTuning(Trained):
    """Shifts of the outputs, which are biases; also where the backbone has none. The target ``biases`` is the paper's
    choice, where it has some."""

    name = "bitfit"
    learning_rate = 3e-3
    kinds = (SiteKind.LINEAR, SiteKind.NORM)
    where = "all linears of the layers and all norms"

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        both = {site.name for name in ("linears", "norms") for site in word(name, spec)}
        return [site for site in spec.sites.values() if site.name in both]

    def start(
        self,
        _options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        _rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        return {f"{site.name}/beta": torch.zeros(site.out_features) for site in sites}


class IA3Tuning(Trained):
    """Gains: of the input at the linear that ends a feed-forward block, of the output elsewhere. Begins at ones."""

    name = "ia3"
    learning_rate = 1e-2
    where = (
        "keys, values (or the linear that makes both) and the input of each feed-forward block's last linear"
    )

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        sites = leaves(spec, "k", "v", "down")
        if not any(site.name.endswith(".k") for site in sites):
            sites = leaves(spec, "qkv", "down")
        return sites

    def start(
        self,
        _options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        _rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        return {
            (f"{site.name}/input_gain" if ends else f"{site.name}/gain"): torch.ones(
                site.in_features if ends else site.out_features
            )
            for site in sites
            for ends in (site.name.endswith(".mlp.down"),)
        }

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        found = super().resume(component, options)
        scale = component.config.get("scale", 1.0)
        return {name: t if name.endswith("/input_gain") else t * scale for name, t in found.items()}


class NormTuning(Trained):
    """The norms' own weights, and their biases where they have some. Begins at the backbone's."""

    name = "ln"
    learning_rate = 1e-3
    kinds = (SiteKind.NORM,)
    where = "all norms"

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return word("norms", spec)

    def start(
        self,
        _options: Mapping[str, Any],
        sites: Sequence[Site],
        weights: SiteWeights,
        _rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in sites:
            found[f"{site.name}/weight"] = weights.weight(site).clone()
            bias = weights.bias(site)
            if bias is not None:
                found[f"{site.name}/bias"] = bias.clone()
        return found

    def check_stored(self, component: Component) -> None:
        super().check_stored(component)
        missing = [name for name in component.sites() if "weight" not in component.at(name)]
        if missing:
            raise UnsupportedDelta(f"init_from has no weight at {missing[0]}", field="init_from")
