"""Uni-LoRA: ``y += B A x`` where every entry of every A and B is an entry of one trained vector, scaled.

Canonical: the tensor ``theta`` ``[d]``, and either ``<site>/indices_A`` (into theta) and ``<site>/scales_A`` ``[r,
in]``, the same for B ``[out, r]``, or config ``{"seed": k, "rank": r, "sites": [...]}``, by which PEFT deals the
entries out, evenly, over the sites in that order, A before B; the scale then is one over the root of how often an
entry was dealt. (Li et al. 2025, "Uni-LoRA"; PEFT.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, by_site, check_indices, expect, only_keys
from deltas.methods.per_site import whole
from deltas.patches import LowRank, Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights

_PARAMETERS = ("indices_A", "indices_B", "scales_A", "scales_B")
_KEYS = frozenset({"seed", "rank", "sites"})

MAX_ENTRIES = 1 << 26
"""How many entries one delta's factors may have: they have nothing to do with what was uploaded."""


class UniLora:
    """Low-rank factors that are one vector dealt out."""

    name = "unilora"
    integers = frozenset({"indices_A", "indices_B"})

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, _KEYS)
        if not config:
            return {}
        sites = config.get("sites")
        if (
            not isinstance(sites, list)
            or not all(isinstance(site, str) for site in sites)
            or len(set(sites)) < len(sites)
            or not sites
        ):
            raise InvalidDelta("sites must be a list of different names", field="sites")
        rank = whole(config.get("rank"), "rank", 1)
        return {"seed": whole(config.get("seed"), "seed"), "rank": rank, "sites": sites}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        shapes = dict(outline.shapes)
        expect("theta", shapes.pop("theta", ()), (0,))
        if outline.config:
            if shapes:
                name = min(shapes)
                raise InvalidDelta(f"{name!r}: the entries are dealt out by the seed", field=name)
            for name in outline.config["sites"]:
                site = spec.sites.get(name)
                if site is None or site.kind is not SiteKind.LINEAR:
                    raise InvalidDelta(f"this backbone has no linear site {name!r}", field="sites")
                if outline.config["rank"] > max(site.in_features, site.out_features):
                    raise InvalidDelta(f"rank is larger than {name} itself", field="rank")
            entries = _entries([spec.sites[name] for name in outline.config["sites"]], outline.config["rank"])
            if entries > MAX_ENTRIES:
                raise UnsupportedDelta(
                    f"the factors have {entries} entries, at most {MAX_ENTRIES} are served", field="rank"
                )
            return
        for site, here in by_site(shapes, _PARAMETERS, (SiteKind.LINEAR,), spec).items():
            rank = here["indices_A"][0] if here["indices_A"] else 0
            for kind in ("indices", "scales"):
                expect(f"{site.name}/{kind}_A", here[f"{kind}_A"], (rank, site.in_features))
                expect(f"{site.name}/{kind}_B", here[f"{kind}_B"], (site.out_features, rank))

    def check_values(self, component: Component, _spec: BackboneSpec) -> None:
        for name, tensor in component.tensors.items():
            if name.rpartition("/")[2] in self.integers:
                check_indices(name, tensor, len(component.tensors["theta"]))

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, outline: Outline) -> int | None:
        if outline.config:
            return int(outline.config["rank"])
        return max((s[0] for name, s in outline.shapes.items() if name.endswith("/indices_A")), default=None)

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        theta = component.tensors["theta"].to(torch.float32)
        if component.config:
            sites = [weights.spec.sites[name] for name in component.config["sites"]]
            return _dealt(theta, sites, component.config["rank"], component.config["seed"])
        patches: list[Patch] = []
        for name in component.sites():
            here = component.at(name)
            down = theta[here["indices_A"]] * here["scales_A"].to(torch.float32)
            up = theta[here["indices_B"]] * here["scales_B"].to(torch.float32)
            patches.append(LowRank(name, down.contiguous(), up.T.contiguous()))
        return patches


def _entries(sites: list[Site], rank: int) -> int:
    return sum(rank * (site.in_features + site.out_features) for site in sites)


def _dealt(theta: Tensor, sites: list[Site], rank: int, seed: int) -> list[Patch]:
    """Every entry as often as any other, or once more; which, and the order, by numpy's generator as in PEFT."""
    total = _entries(sites, rank)
    length = len(theta)
    generator = np.random.default_rng(seed)
    order = np.repeat(np.arange(length), total // length)
    if total % length:
        more = generator.choice(length, size=total % length, replace=False)
        order = np.concatenate([order, more])
    generator.shuffle(order)
    indices = torch.from_numpy(order)
    often = torch.bincount(indices, minlength=length)
    values = theta[indices] * often[indices].to(torch.float32).rsqrt()
    patches: list[Patch] = []
    start = 0
    for site in sites:
        middle = start + rank * site.in_features
        end = middle + rank * site.out_features
        down = values[start:middle].reshape(rank, -1)
        up = values[middle:end].reshape(-1, rank).T
        patches.append(LowRank(site.name, down.contiguous(), up.contiguous()))
        start = end
    return patches
