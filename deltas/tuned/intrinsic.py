"""Intrinsic dimension (Aghajanyan et al. 2021): few numbers that a fixed projection deals out over many weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.methods.intrinsic import deal
from deltas.patches import DenseDiff, Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tunable import Parameters
from deltas.tuned.base import Trained, require
from deltas.tuned.options import Option, count, flag
from deltas.tuned.targets import word
from deltas.weights import SiteWeights

_AT_ONCE = 1 << 18


class IntrinsicTuning(Trained):
    """``theta``, and one number for each site where it is structured. Begins at no change."""

    name = "intrinsic"
    learning_rate = 1e-3
    kinds = (SiteKind.LINEAR, SiteKind.NORM)
    where = "all linears of the layers"
    known = (
        Option("dimensions", 1000, count(1, 1 << 24), "how many numbers are trained"),
        Option("structured", True, flag, "train a scale of each site too"),
        Option("seed", 0, count(0, (1 << 63) - 1), "of the projection"),
    )

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return word("linears", spec)

    def start(
        self,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        _rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        found = {"theta": torch.zeros(options["dimensions"])}
        if options["structured"]:
            found["scales"] = torch.ones(len(sites))
        return found

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        self.check_stored(component)
        require(options, component, "seed")
        found = super().resume(component, options)
        if component.config["biases"] or ("scales" in found) != options["structured"]:
            raise UnsupportedDelta(
                "structured must be as in init_from, which may not move biases", field="structured"
            )
        return found | {"theta": found["theta"] * component.config["scale"]}

    def stored_sites(self, component: Component, spec: BackboneSpec, /) -> list[Site]:
        return [spec.sites[name] for name in component.config["sites"]]

    def config(self, options: Mapping[str, Any], sites: Sequence[Site], /) -> dict[str, Any]:
        return {"seed": options["seed"], "sites": [site.name for site in sites]}

    def patches(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        _rng: torch.Generator | None,
        /,
    ) -> list[Patch]:
        theta = parameters["theta"]
        both = torch.cat([theta, -theta])
        patches: list[Patch] = []
        for place, site in enumerate(sites):
            dealt = _dealt(options["seed"], f"{site.name}/weight", site.weight_shape, len(theta))
            moved = both.index_select(0, dealt.to(theta.device)).view(site.weight_shape)
            patches.append(
                DenseDiff(site.name, moved * parameters["scales"][place] if options["structured"] else moved)
            )
        return patches


@lru_cache(maxsize=512)
def _dealt(seed: int, target: str, shape: tuple[int, ...], dimensions: int) -> Tensor:
    """Which of theta's numbers, or of their negatives behind them, each entry takes: int32 ``[entries]``.

    Kept, because it takes longer than a step; four bytes for each weight that is moved.
    """
    size = torch.Size(shape).numel()
    found = torch.empty(size, dtype=torch.int32)
    for start in range(0, size, _AT_ONCE):
        amount = min(_AT_ONCE, size - start)
        index, negative = deal(seed, target, start, amount, dimensions)
        found[start : start + amount] = torch.from_numpy(index + dimensions * negative.astype(np.int64))
    return found
