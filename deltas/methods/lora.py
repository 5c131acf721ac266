"""LoRA (Hu et al., 2022): ``y += s B (A x)`` at linears and embeddings, and DoRA (Liu et al., 2024).

Canonical tensors ``<site>/A`` ``[r, in]`` and ``<site>/B`` ``[out, r]`` (``in`` is the number of rows at an embedding);
optional ``<site>/bias`` ``[out]``, which ``s`` scales too, and ``<site>/magnitude`` ``[out]``. Config:

- ``scale``: s, with ``scales`` ``{site: s}`` for the sites whose scale differs.
- ``dora``: how the magnitude m acts, row by row. ``"peft"``: y = b + g (W x + s B A x) with g = m / norm(W + s B A);
  ``"adapterhub"``: y = g (W x + b + s B A x) with g = m / norm(W + B A).
- ``init``: ``"pissa"`` or ``"olora"``: the factors were saved beside a backbone from which their initial product,
  made of the backbone's own weights, had been taken; it is taken off here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, by_site, each_site, expect, number, only_keys
from deltas.patches import EmbeddingLowRank, Gain, LowRank, Patch, Shift
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights

_KEYS = frozenset({"scale", "scales", "dora", "init"})
_DORA = ("peft", "adapterhub")
_INITS = ("pissa", "olora")


class Lora:
    """Low-rank additions."""

    name = "lora"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, _KEYS)
        result: dict[str, Any] = {"scale": number(config.get("scale"), "scale")}
        exceptions = config.get("scales", {})
        if not isinstance(exceptions, Mapping):
            raise InvalidDelta("scales must be an object", field="scales")
        scales = {str(site): number(value, "scales") for site, value in exceptions.items()}
        scales = {site: value for site, value in scales.items() if value != result["scale"]}
        if scales:
            result["scales"] = scales
        for key, known in (("dora", _DORA), ("init", _INITS)):
            if config.get(key) is not None:
                if config[key] not in known:
                    raise InvalidDelta(f"{key} must be one of {', '.join(known)}", field=key)
                result[key] = config[key]
        return result

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        kinds = (SiteKind.LINEAR, SiteKind.EMBEDDING)
        sites = by_site(outline.shapes, ("A", "B"), kinds, spec, optional=("bias", "magnitude"))
        for site, parameters in sites.items():
            expect(f"{site.name}/A", parameters["A"], (0, site.in_features))
            rank = parameters["A"][0]
            expect(f"{site.name}/B", parameters["B"], (site.out_features, rank))
            for optional in ("bias", "magnitude"):
                if optional in parameters:
                    expect(f"{site.name}/{optional}", parameters[optional], (site.out_features,))
            if "magnitude" in parameters and "dora" not in outline.config:
                raise InvalidDelta("there is a magnitude, but no dora in the config", field="dora")
            if outline.config.get("dora") == "adapterhub" and (
                "bias" in parameters or site.kind is SiteKind.EMBEDDING
            ):
                raise UnsupportedDelta(
                    f"{site.name}: AdapterHub's DoRA has no bias and is for linears", field=f"{site.name}/A"
                )
        named = {site.name for site in sites}
        for name in outline.config.get("scales", {}):
            if name not in named:
                raise InvalidDelta(f"scales names {name!r}, where there are no tensors", field="scales")

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        config = component.config
        patches: list[Patch] = []
        for site, tensors in each_site(component, weights.spec):
            scale = config.get("scales", {}).get(site.name, config["scale"])
            down, up = tensors["A"], tensors["B"].T * scale
            shift = tensors["bias"] * scale if "bias" in tensors else None
            if "init" in config:
                down, up = _without_start(down, up, config["init"], scale, site, weights)
            if "magnitude" in tensors and config["dora"] == "adapterhub":
                patches += adapterhub_dora(site, down, tensors["B"], scale, tensors["magnitude"], weights)
                continue
            if "magnitude" in tensors:
                gain = _dora_gain(tensors["magnitude"], down, up, site, weights)
                patches.append(Gain(site.name, gain, multiplies=False))
                up = up * gain
                shift = None if shift is None else shift * gain
                bias = weights.bias(site)
                if bias is not None:
                    shift = (1 - gain) * bias if shift is None else shift + (1 - gain) * bias
            if site.kind is SiteKind.EMBEDDING:
                patches.append(EmbeddingLowRank(site.name, down.T.contiguous(), up.contiguous()))
            else:
                patches.append(LowRank(site.name, down.contiguous(), up.contiguous()))
            if shift is not None:
                patches.append(Shift(site.name, shift.contiguous()))
        return patches


def adapterhub_dora(
    site: Site, down: Tensor, second: Tensor, scale: float, magnitude: Tensor, weights: SiteWeights
) -> list[Patch]:
    """``y = g (W x + b + s B A x)`` at a linear, with the norms of ``W + B A``: the library leaves s out of them.

    ``down`` is A ``[r, in]``, ``second`` B ``[out, r]``. Raises :class:`InvalidDelta` for a row without a direction.
    """
    gain = _dora_gain(magnitude, down, second.T, site, weights)
    up = second.T * scale * gain
    return [Gain(site.name, gain, multiplies=False), LowRank(site.name, down.contiguous(), up.contiguous())]


def _own(site: Site, weights: SiteWeights) -> Tensor:
    """The backbone's weight as ``[out, in]``, an embedding's table transposed."""
    weight = weights.weight(site)
    return weight.T if site.kind is SiteKind.EMBEDDING else weight


def _dora_gain(magnitude: Tensor, down: Tensor, up: Tensor, site: Site, weights: SiteWeights) -> Tensor:
    with torch.no_grad():  # a constant where the delta is trained, as in the paper and in PEFT
        norms: Tensor = torch.linalg.vector_norm(_own(site, weights) + up.T @ down, dim=1)
    if bool((norms == 0).any()):
        raise InvalidDelta(
            f"{site.name}: W + s B A has a row of zeros, which has no direction", field=site.name
        )
    return magnitude / norms


def _without_start(
    down: Tensor, up: Tensor, init: str, scale: float, site: Site, weights: SiteWeights
) -> tuple[Tensor, Tensor]:
    """The trained product less the one that training began with, which the backbone had been relieved of."""
    rank, weight = len(down), _own(site, weights)
    if init == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        start_down, start_up = v[:rank], (u[:, :rank] * s[:rank]).T
    else:
        q, r = torch.linalg.qr(weight)
        start_down, start_up = r[:rank], q[:, :rank].T * scale
    return torch.cat([down, start_down]), torch.cat([up, -start_up])
