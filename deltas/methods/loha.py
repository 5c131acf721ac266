"""LoHa: ``y += s ((w1_a w1_b) * (w2_a w2_b)) x``, the elementwise product of two low-rank matrices, of rank up to r^2.

Canonical tensors ``<site>/w1_a``, ``<site>/w2_a`` ``[out, r]`` and ``<site>/w1_b``, ``<site>/w2_b`` ``[r, in]``;
config ``{"scale": s}`` with ``"scales"``. (Hyeon-Woo et al. 2022, "FedPara"; LyCORIS.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.methods.base import Outline, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, scale_at, scales
from deltas.patches import DenseDiff, LowRank, Patch


class LoHa(PerSite):
    """Hadamard products of low-rank matrices."""

    name = "loha"
    required = ("w1_a", "w1_b", "w2_a", "w2_b")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "scales"}))
        return scales(config)

    def check_site(self, here: Outlined) -> None:
        for first, second in (("w1_a", "w1_b"), ("w2_a", "w2_b")):
            rank = here.expect(first, here.site.out_features, 0)[1]
            here.expect(second, rank, here.site.in_features)

    def rank(self, outline: Outline) -> int | None:
        sizes = (shape[1] for name, shape in outline.shapes.items() if name.endswith("_a"))
        return max(sizes, default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        one, two = (here["w1_a"], here["w1_b"]), (here["w2_a"], here["w2_b"])
        scale, site = scale_at(here), here.site
        rank = one[0].shape[1] * two[0].shape[1]
        if rank * (site.in_features + site.out_features) < site.in_features * site.out_features:
            up = _products(one[0].T, two[0].T) * scale
            yield LowRank(site.name, _products(one[1], two[1]), up.contiguous())
        else:
            matrix = (one[0] @ one[1]) * (two[0] @ two[1]) * scale
            yield DenseDiff(site.name, matrix.contiguous())


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Every row of one times every row of the other: ``[a, n], [b, n] -> [ab, n]``, the Khatri-Rao product."""
    return torch.einsum("an,bn->abn", first, second).reshape(-1, first.shape[1]).contiguous()
