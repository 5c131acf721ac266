"""HRA: ``y = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T) x + b``: Householder reflections of the input, u_i of length
one.

Canonical tensor ``<site>/u`` ``[in, r]``, columns of any length; config ``{"orthogonal": true}`` makes the columns
orthonormal first (Gram-Schmidt). The product less the identity has rank r, in compact form ``- U M U^T``. (Yuan et
al. 2024, "HRA".)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.methods.base import Outline, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, truth
from deltas.patches import LowRank, Patch


class Hra(PerSite):
    """Chains of reflections of a linear's input."""

    name = "hra"
    required = ("u",)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"orthogonal"}))
        return {"orthogonal": True} if truth(config.get("orthogonal", False), "orthogonal") else {}

    def check_site(self, here: Outlined) -> None:
        rank = here.expect("u", here.site.in_features, 0)[1]
        if rank > here.site.in_features:
            raise here.refuse("u", "more reflections than the input is wide")

    def rank(self, outline: Outline) -> int | None:
        return max((shape[1] for shape in outline.shapes.values()), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        units = here["u"].to(torch.float64)
        if here.config.get("orthogonal"):
            units = _gram_schmidt(units)
            middle = 2 * torch.eye(units.shape[1], dtype=torch.float64)
        else:
            units = units / units.norm(dim=0)
            middle = _compact(units)
        weight = here.weights.weight(here.site).to(torch.float64)
        up = -(weight @ units @ middle).T
        yield LowRank(here.site.name, units.T.float().contiguous(), up.float().contiguous())


def _compact(units: Tensor) -> Tensor:
    """M ``[r, r]`` with ``prod (I - 2 u_i u_i^T) = I - U M U^T``, by one more column at a time."""
    rank = units.shape[1]
    middle = torch.zeros(rank, rank, dtype=units.dtype)
    for k in range(rank):
        middle[:k, k] = -2 * middle[:k, :k] @ (units[:, :k].T @ units[:, k])
        middle[k, k] = 2
    return middle


def _gram_schmidt(columns: Tensor) -> Tensor:
    """Orthonormal columns that span what the first, the first two, ... columns span, of the same directions."""
    done: list[Tensor] = []
    for column in columns.T:
        rest = column
        for unit in done:
            rest = rest - (unit @ rest) * unit
        done.append(rest / rest.norm())
    return torch.stack(done, dim=1)
