"""Intrinsic-dimension deltas: many weights moved by few numbers through a fixed random projection (Aghajanyan et al. 2021).

Canonical: ``theta`` ``[d]``, optional ``scales`` ``[targets]`` (one number per target: the paper's structure-aware
variant) and config ``{"seed": k, "scale": s, "sites": [...], "biases": [...]}``. The targets are the weights of
``sites`` (linears, norms), then the biases of ``biases`` (linears, norms; also where the backbone has none). Entry e
of target t, from 0, row by row in the site's shape (``[out, in]`` of a linear), moves by ``s * scales[t] * sign *
theta[i]``, where i and sign are dealt as follows. SplitMix64 (Steele et al. 2014) starts from the first eight bytes,
little end first, of the SHA-256 of the text ``deltaserve-intrinsic-1/<seed>/<site>/<weight or bias>``; with z its
output number e + 1, ``i = ((z >> 32) * d) >> 32``, and the sign is minus where z is odd.

So the projection is sparse, one entry a row and d columns that share no row. (The paper's is Fastfood, which stays as
close to an isometry; Li et al. 2018 measure intrinsic dimensions with either.) It is integer arithmetic, hence the
same numbers on every machine and with every version of every library, and it takes seconds for a hundred million
weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, expect, number, only_keys
from deltas.methods.per_site import whole
from deltas.patches import DenseDiff, Patch, Shift
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights

MAX_ENTRIES = 1 << 28
"""How many entries one delta may move: what it costs once projected has nothing to do with what was uploaded."""

_KINDS = (SiteKind.LINEAR, SiteKind.NORM)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_AT_ONCE = 1 << 18


class Intrinsic:
    """A vector projected onto weights and biases."""

    name = "intrinsic"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"seed", "scale", "sites", "biases"}))
        sites, biases = (_names(config.get(key, []), key) for key in ("sites", "biases"))
        if not sites and not biases:
            raise InvalidDelta("sites and biases name nothing", field="sites")
        seed, scale = whole(config.get("seed"), "seed"), number(config.get("scale", 1.0), "scale")
        return {"seed": seed, "scale": scale, "sites": sites, "biases": biases}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        shapes = outline.shapes
        unknown = sorted(set(shapes) - {"theta", "scales"})
        if unknown:
            raise InvalidDelta(f"{unknown[0]!r}: there are only 'theta' and 'scales'", field=unknown[0])
        if "theta" not in shapes:
            raise InvalidDelta("missing tensor: theta", field="theta")
        expect("theta", shapes["theta"], (0,))
        for key in ("sites", "biases"):
            for name in outline.config[key]:
                site = spec.sites.get(name)
                if site is None or site.kind not in _KINDS:
                    raise InvalidDelta(f"{key}: no linear or norm {name!r}", field=key)
        targets = list(_targets(outline.config, spec))
        if "scales" in shapes:
            expect("scales", shapes["scales"], (len(targets),))
        entries = sum(torch.Size(shape).numel() for _, _, shape in targets)
        if entries > MAX_ENTRIES:
            raise UnsupportedDelta(
                f"the projection fills {entries} weights, at most {MAX_ENTRIES} are served", field="sites"
            )

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset({"the projected weights"})  # one delta, one limit on what it costs

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        config, theta = component.config, component.tensors["theta"].float()
        scales = component.tensors.get("scales")
        patches: list[Patch] = []
        for t, (site, parameter, shape) in enumerate(_targets(config, weights.spec)):
            moved = project(theta, config["seed"], f"{site.name}/{parameter}", shape)
            moved *= config["scale"] if scales is None else config["scale"] * float(scales[t])
            patches.append(DenseDiff(site.name, moved) if parameter == "weight" else Shift(site.name, moved))
        return patches


def project(theta: Tensor, seed: int, target: str, shape: tuple[int, ...]) -> Tensor:
    """``theta`` ``[d]`` float32 dealt out over a target (``<site>/weight`` or ``<site>/bias``) of this shape."""
    size = torch.Size(shape).numel()
    moved = torch.empty(size)
    for start in range(0, size, _AT_ONCE):
        count = min(_AT_ONCE, size - start)
        index, negative = deal(seed, target, start, count, len(theta))
        part = theta[torch.from_numpy(index)]
        moved[start : start + count] = torch.where(torch.from_numpy(negative), -part, part)
    return moved.reshape(shape)


def deal(
    seed: int, target: str, start: int, count: int, dimensions: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Which number of theta each entry from ``start`` on takes, and whether with the sign turned: ``[count]`` each.

    As this module's own description says; ``target`` is ``<site>/weight`` or ``<site>/bias``.
    """
    name = f"deltaserve-intrinsic-1/{seed}/{target}"
    state = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    z = state + np.arange(start + 1, start + count + 1, dtype=np.uint64) * _STEP  # modulo 2^64, as all here
    for shift, factor in _MIXES:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    index = ((z >> np.uint64(32)) * np.uint64(dimensions)) >> np.uint64(32)
    return index.astype(np.int64), (z & np.uint64(1)).astype(np.bool_)


def _targets(config: Mapping[str, Any], spec: BackboneSpec) -> Iterator[tuple[Site, str, tuple[int, ...]]]:
    for name in config["sites"]:
        yield spec.sites[name], "weight", spec.sites[name].weight_shape
    for name in config["biases"]:
        yield spec.sites[name], "bias", (spec.sites[name].out_features,)


def _names(value: object, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InvalidDelta(f"{field} must be a list of sites", field=field)
    if len(set(value)) < len(value):
        raise InvalidDelta(f"{field} names a site twice", field=field)
    return list(value)
