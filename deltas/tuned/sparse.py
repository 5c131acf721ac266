"""Methods that train something as large as the weights and keep few places: diff pruning (Guo et al. 2021) and masking
(Zhao et al. 2020). What is stored does not tell how training came there, so neither is trained on from its file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS
from deltas.patches import DenseDiff, Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tunable import Parameters
from deltas.tuned.base import Trained
from deltas.tuned.options import Option, real
from deltas.tuned.targets import word
from deltas.weights import SiteWeights


class _Places(Trained):
    """Dense while it trains; without a generator (evaluation, which no gradient goes through) what would be stored."""

    kinds = (SiteKind.LINEAR, SiteKind.NORM)
    where = "all linears of the layers"

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return word("linears", spec)

    def sites(self, targets: Sequence[str] | None, spec: BackboneSpec, /) -> list[Site]:
        sites = super().sites(targets, spec)
        whole = {site.path: site.name for site in sites if not site.part}
        for site in sites:
            if site.part and site.path in whole:
                raise InvalidDelta(
                    f"targets: {site.name} is part of {whole[site.path]}, too", field="targets"
                )
        return sites

    def resume(self, component: Component, _options: Mapping[str, Any], /) -> dict[str, Tensor]:
        raise UnsupportedDelta(
            f"{self.name} cannot go on from a component of {component.method}: only places are kept. Freeze it "
            "beside a new one",
            field="init_from",
        )

    def patches(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        weights: SiteWeights,
        rng: torch.Generator | None,
        /,
    ) -> list[Patch]:
        if rng is None:
            kept = self.component(parameters, options, sites, weights)
            return METHODS[self.method].lower(kept, weights)
        return [DenseDiff(site.name, self.change(parameters, site, weights, rng)) for site in sites]

    def change(
        self, parameters: Parameters, site: Site, weights: SiteWeights, rng: torch.Generator
    ) -> Tensor:
        """What the site's weight is more while it trains."""
        raise NotImplementedError


_STRETCH = 1.5
"""Hard concrete gates: a logistic variable stretched to (-1.5, 1.5), cut to [0, 1]."""
_OPEN = 5.0
_GATE_RATE = 100.0
"""Gates learn by steps this much larger than the values', as in the paper."""


class DiffPruningTuning(_Places):
    """Differences, each behind a gate that is drawn in training and whose being open has a price (L0).

    The price falls due on the share of open gates above ``density``. What is kept are the ``density`` largest products of
    value and mean gate, over all sites.
    """

    name = "diff_pruning"
    learning_rate = 1e-3
    known = (
        Option("density", 0.005, real(0, 1, open_below=True), "share of the sites' entries that are kept"),
        Option(
            "penalty",
            10.0,
            real(0, 1e6),
            "price of the share of open gates beyond density, added to the loss",
        ),
    )

    def start(
        self,
        _options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        _rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        names = ("values", "gates")
        return {f"{site.name}/{name}": torch.zeros(site.weight_shape) for site in sites for name in names}

    def change(
        self, parameters: Parameters, site: Site, _weights: SiteWeights, rng: torch.Generator
    ) -> Tensor:
        values = parameters[f"{site.name}/values"]
        draw = torch.rand(values.shape, generator=rng).clamp_(1e-6, 1 - 1e-6).to(values.device)
        return values * _gate(parameters[f"{site.name}/gates"], draw.logit())

    def penalty(self, parameters: Parameters, options: Mapping[str, Any], /) -> Tensor | None:
        gates = [tensor for name, tensor in parameters.items() if name.endswith("/gates")]
        opened = torch.stack([torch.sigmoid(_OPEN + _GATE_RATE * gate).sum() for gate in gates]).sum()
        share = opened / sum(gate.numel() for gate in gates)
        price: Tensor = options["penalty"] * (share - options["density"]).clamp_min(0)
        return price

    @torch.no_grad()
    def component(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        /,
    ) -> Component:
        changes = {
            site.name: parameters[f"{site.name}/values"].cpu() * _gate(parameters[f"{site.name}/gates"].cpu())
            for site in sites
        }
        sizes = torch.cat([change.abs().reshape(-1) for change in changes.values()])
        kept = torch.zeros(len(sizes), dtype=torch.bool)
        kept[sizes.topk(math.ceil(options["density"] * len(sizes))).indices] = True
        kept &= sizes > 0
        if not bool(kept.any()):
            kept[0] = True  # a component has at least one entry; this one is zero
        tensors: dict[str, Tensor] = {}
        start = 0
        for name, change in changes.items():
            places = kept[start : start + change.numel()].reshape(change.shape).nonzero().T.contiguous()
            start += change.numel()
            if places.shape[1]:
                tensors |= {f"{name}/indices": places, f"{name}/values": change[tuple(places)].contiguous()}
        return self.form(tensors, options, sites)


def _gate(gates: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    opened = torch.sigmoid(noise + _OPEN + _GATE_RATE * gates)
    return (opened * (2 * _STRETCH) - _STRETCH).clamp(0, 1)


class MaskingTuning(_Places):
    """A score for each weight, which is zero where the score is below zero. The gradient takes the step for the identity.

    Begins with evenly spread scores, of which ``sparsity`` are below zero.
    """

    name = "masking"
    learning_rate = 1e-4
    known = (
        Option("sparsity", 0.05, real(0, 1), "share of the weights that are zero when training begins"),
        Option("spread", 0.02, real(0, 1e3, open_below=True), "from the smallest first score to the largest"),
    )

    def start(
        self,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        share, spread = options["sparsity"], options["spread"]
        return {
            f"{site.name}/scores": (torch.rand(site.weight_shape, generator=rng) - share) * spread
            for site in sites
        }

    def change(
        self, parameters: Parameters, site: Site, weights: SiteWeights, _rng: torch.Generator
    ) -> Tensor:
        scores = parameters[f"{site.name}/scores"]
        kept = (scores >= 0).to(scores.dtype) + scores - scores.detach()
        return weights.weight(site).to(scores.device) * (kept - 1)

    @torch.no_grad()
    def component(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        /,
    ) -> Component:
        scores = {site.name: parameters[f"{site.name}/scores"].cpu() for site in sites}
        places = {name: (tensor < 0).nonzero().T.contiguous() for name, tensor in scores.items()}
        found = {f"{name}/indices": there for name, there in places.items() if there.shape[1]}
        if not found:  # a component has at least one entry: the lowest score's
            name = min(scores, key=lambda name: float(scores[name].min()))
            lowest = torch.unravel_index(scores[name].argmin(), scores[name].shape)
            found = {f"{name}/indices": torch.stack(lowest)[:, None].contiguous()}
        return self.form(found, options, sites)
