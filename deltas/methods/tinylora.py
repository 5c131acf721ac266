"""TinyLoRA: ``y += B (sum_i v_i P_i) A x`` with A and B from the weight's singular vectors, P random, v a few trained
numbers.

Canonical tensors ``<site>/A`` ``[r, in]``, ``<site>/B`` ``[out, r]``, ``<site>/v`` ``[u]`` (sites may have the
same) and ``<site>/P`` ``[u, r, r]``, or instead of P config ``{"seeds": {site: k}}``, by which PEFT draws it. At an
embedding A is ``[r, width]`` and B ``[rows, r]``. (PEFT 0.21; after LoRA-XS, Balazy et al. 2024.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, whole
from deltas.patches import EmbeddingLowRank, LowRank, Patch
from deltas.sites import SiteKind


class TinyLora(PerSite):
    """Low-rank additions with a handful of trained numbers."""

    name = "tinylora"
    kinds = (SiteKind.LINEAR, SiteKind.EMBEDDING)
    required = ("A", "B", "v")
    optional = ("P",)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"seeds"}))
        seeds = config.get("seeds", {})
        if not isinstance(seeds, Mapping):
            raise InvalidDelta("seeds must be an object", field="seeds")
        found = {str(site): whole(seed, "seeds") for site, seed in seeds.items()}
        return {"seeds": found} if found else {}

    def check_site(self, here: Outlined) -> None:
        embedding = here.site.kind is SiteKind.EMBEDDING
        sizes = (here.site.in_features, here.site.out_features)
        inner, outer = sizes[::-1] if embedding else sizes
        rank = here.expect("A", 0, inner)[0]
        here.expect("B", outer, rank)
        count = here.expect("v", 0)[0]
        if "P" in here.shapes:
            here.expect("P", count, rank, rank)
        elif here.site.name not in here.config.get("seeds", {}):
            name = f"{here.site.name}/P"
            raise InvalidDelta(f"missing tensor: {name}, and there is no seed for it", field=name)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        mixed = torch.einsum("i,ijk->jk", here["v"], _projections(here))
        if here.site.kind is SiteKind.EMBEDDING:
            yield EmbeddingLowRank(here.site.name, here["B"], (mixed @ here["A"]).contiguous())
        else:
            yield LowRank(here.site.name, here["A"], (here["B"] @ mixed).T.contiguous())


def _projections(here: Loaded) -> Tensor:
    if "P" in here:
        return here["P"]
    count, rank = len(here["v"]), len(here["A"])
    generator = torch.Generator().manual_seed(here.config["seeds"][here.site.name])
    return torch.normal(0.0, 1 / math.sqrt(rank), (count, rank, rank), generator=generator)
