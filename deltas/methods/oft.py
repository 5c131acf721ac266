"""OFT: ``y = W (x R) + b`` with R block-diagonal, each block a Cayley transform of a trained skew-symmetric matrix.

Canonical tensor ``<site>/Q`` ``[blocks, n]``: the upper triangles, row by row, of matrices of size m with n = m (m
- 1) / 2. Config: ``{"terms": t}`` for the first terms of the transform's series, as PEFT does, without it the
transform itself; ``{"shared": true}`` where one block serves all; ``{"limit": e}`` (COFT) bounds a skew matrix'
norm by e / sqrt(blocks). At an embedding it is the output that is rotated. (Qiu et al. 2023, 2025, "OFT"; PEFT 0.18
and later.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.methods.base import number, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, truth, whole
from deltas.patches import Patch, Rotation
from deltas.sites import SiteKind

MAX_TERMS = 64  # published deltas have 5; each is a product of matrices at every load


class Oft(PerSite):
    """Rotations of a linear's input."""

    name = "oft"
    kinds = (SiteKind.LINEAR, SiteKind.EMBEDDING)
    required = ("Q",)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"terms", "shared", "limit"}))
        result: dict[str, Any] = {}
        if config.get("terms") is not None:
            result["terms"] = whole(config["terms"], "terms", 1, MAX_TERMS)
        if truth(config.get("shared", False), "shared"):
            result["shared"] = True
        if config.get("limit") is not None:
            result["limit"] = number(config["limit"], "limit")
        return result

    def check_site(self, here: Outlined) -> None:
        blocks, entries = here.expect("Q", 0, 0)
        size = _size(entries)
        width = _width(here)
        if not size or width % size:
            raise here.refuse("Q", f"no block of a size that divides {width} has so many entries")
        expected = 1 if here.config.get("shared") else width // size
        if blocks != expected:
            raise here.refuse("Q", f"expected {expected} blocks of {size} x {size}")

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        skew = _skew(here["Q"])
        if "limit" in here.config:
            skew = _bounded(skew, here.config["limit"])
        terms = here.config.get("terms")
        blocks = cayley(skew) if terms is None else series(skew, terms)
        if here.config.get("shared"):
            blocks = blocks.repeat(_width(here) // blocks.shape[-1], 1, 1)
        yield Rotation(here.site.name, blocks.contiguous())


def _width(here: Outlined | Loaded) -> int:
    embedding = here.site.kind is SiteKind.EMBEDDING
    return here.site.out_features if embedding else here.site.in_features


def _size(entries: int) -> int:
    """The size m of a matrix whose upper triangle has m (m - 1) / 2 entries; 0 where there is none."""
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    return size if size * (size - 1) // 2 == entries else 0


def _skew(upper: Tensor) -> Tensor:
    """``[blocks, n]`` upper triangles -> ``[blocks, m, m]`` skew-symmetric matrices."""
    size = _size(upper.shape[1])
    rows, columns = torch.triu_indices(size, size, 1)
    matrices = torch.zeros(len(upper), size, size)
    matrices[:, rows, columns] = upper
    return matrices - matrices.transpose(1, 2)


def _bounded(skew: Tensor, limit: float) -> Tensor:
    most = limit / math.sqrt(len(skew))
    norms = skew.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norms <= most, skew, skew * (most / norms.clamp(min=torch.finfo(torch.float32).tiny)))


def cayley(skew: Tensor) -> Tensor:
    """``(I - Q) (I + Q)^-1`` of a batch of skew-symmetric matrices ``[n, m, m]``."""
    identity = torch.eye(skew.shape[-1]).expand_as(skew)
    result: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return result


def series(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series for ``(I + Q) (I - Q)^-1``: ``I + 2Q + ... + 2Q^(t-2) + Q^(t-1)`` (t = 3 gives what 4 does)."""
    result = torch.eye(skew.shape[-1]).repeat(len(skew), 1, 1)
    if terms == 1:
        return result
    result += 2 * skew
    if terms == 2:
        return result
    power = skew @ skew
    result += 2 * power
    for _ in range(terms - 4):
        power = power @ skew
        result += 2 * power
    return result + power @ skew
