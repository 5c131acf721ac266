"""LORA: LoRA and DoRA, at linears and embeddings, with the scale of every module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft_writer.form import (
    Form,
    Here,
    Modules,
    commonest,
    patterns,
    plain,
    scale_of,
    sites_of,
)
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights


def lora(component: Component, weights: SiteWeights) -> Form:
    """PEFT scales by ``alpha / r`` (or ``alpha / sqrt(r)``), so each scale becomes an alpha."""
    spec, dora = weights.spec, component.config.get("dora")
    every = sites_of(component, spec)
    biased = any("bias" in here.tensors for here in every)
    scales = {here.site.name: scale_of(component, here) for here in every}
    modules, by_path, ranks = Modules(), {}, {}
    for path, parts in _by_path(every).items():
        tensors, scale = _merged(component, parts, scales, weights)
        module = spec.by_path[path]
        ranks[path], by_path[path] = tensors["A"].shape[0], scale
        if module.kind is SiteKind.EMBEDDING:
            named = {"lora_embedding_A": tensors["A"], "lora_embedding_B": tensors["B"]}
        else:
            named = {"lora_A.weight": tensors["A"], "lora_B.weight": tensors["B"]}
        if biased:
            zeros = torch.zeros(module.out_features, dtype=tensors["B"].dtype)
            named["lora_B.bias"] = tensors.get("bias", zeros)
        if dora is not None:
            named["lora_magnitude_vector"] = _magnitude(tensors, module, dora, scale)
        modules.add(path, named)
    default = component.config["scale"] if component.config["scale"] in by_path.values() else None
    return modules.form(
        "LORA",
        {
            **_scaling(by_path, ranks, default, weights.spec),
            "use_dora": dora is not None,
            "lora_bias": biased,
            "init_lora_weights": component.config.get("init", True),
            "lora_dropout": 0.0,
            "fan_in_fan_out": spec.conv1d,
        },
    )


def _by_path(every: list[Here]) -> dict[str, list[Here]]:
    found: dict[str, list[Here]] = {}
    for here in every:
        found.setdefault(here.site.path, []).append(here)
    return found


def _merged(
    component: Component, parts: list[Here], scales: Mapping[str, float], weights: SiteWeights
) -> tuple[Mapping[str, Tensor], float]:
    """The tensors of one module and its scale; changes of several parts of a fused linear stand side by side."""
    if not any(here.site.part for here in parts):
        (here,) = parts
        return here.tensors, scales[here.site.name]
    module = weights.spec.by_path[parts[0].site.path]
    downs, ups = [], []
    bias: Tensor | None = None
    for here in parts:
        site = here.site
        if "magnitude" in here.tensors or "init" in component.config:
            raise UnsupportedDelta(
                f"it depends on the weight of {site.name}, a part of {site.path}; PEFT's on whole weights",
                field=site.name,
            )
        rows = slice(site.offset, site.offset + site.out_features)
        up = here.tensors["B"]
        placed = torch.zeros(module.out_features, up.shape[1])
        placed[rows] = up.to(torch.float32) * scales[site.name]
        downs.append(here.tensors["A"])
        ups.append(placed.to(up.dtype))
        if "bias" in here.tensors:
            bias = torch.zeros(module.out_features) if bias is None else bias
            bias[rows] += here.tensors["bias"].to(torch.float32) * scales[site.name]
    merged = {"A": torch.cat(downs), "B": torch.cat(ups, dim=1)}
    return (merged if bias is None else merged | {"bias": bias}), 1.0


def _magnitude(tensors: Mapping[str, Tensor], site: Site, dora: str, scale: float) -> Tensor:
    if "magnitude" not in tensors:
        raise UnsupportedDelta(
            f"{site.name} has no magnitude, others have: PEFT has one for every module", field=site.name
        )
    if dora != "peft" and (site.bias or scale != 1.0):
        raise UnsupportedDelta(
            f"{site.name}: AdapterHub's DoRA scales the bias too, and takes norms without the factors' scale; "
            "PEFT does neither",
            field=site.name,
        )
    return tensors["magnitude"]


def _scaling(
    scales: Mapping[str, float], ranks: Mapping[str, int], default: float | None, spec: BackboneSpec
) -> dict[str, Any]:
    """r, alpha and their patterns; by the square root of the rank where only that makes every alpha an integer."""
    plain_alphas = {path: scale * ranks[path] for path, scale in scales.items()}
    root_alphas = {path: scale * math.sqrt(ranks[path]) for path, scale in scales.items()}
    rooted = _integers(root_alphas) and not _integers(plain_alphas)
    alphas = {path: plain(alpha) for path, alpha in (root_alphas if rooted else plain_alphas).items()}
    rank = commonest(ranks.values())
    times = math.sqrt(rank) if rooted else rank
    alpha = commonest(alphas.values()) if default is None else plain(default * times)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rooted,
        "rank_pattern": patterns(ranks, rank, spec),
        "alpha_pattern": patterns(alphas, alpha, spec),
    }


def _integers(values: Mapping[str, float]) -> bool:
    return all(isinstance(plain(value), int) for value in values.values())
