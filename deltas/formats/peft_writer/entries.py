"""PEFT's types whose change is given by entries, frequencies or blocks, dealt out of one vector, or made of the weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft_writer.form import (
    SHARED,
    Form,
    Here,
    Modules,
    alike,
    commonest,
    linears_only,
    patterns,
    plain,
    scale_of,
    sites_of,
)
from deltas.weights import SiteWeights


def fourierft(component: Component, weights: SiteWeights) -> Form:
    return _spectrum("FOURIERFT", component, weights, {})


def waveft(component: Component, weights: SiteWeights) -> Form:
    haar = bool(component.config.get("haar"))
    return _spectrum("WAVEFT", component, weights, {"use_idwt": haar, "wavelet_family": "db1"})


def _spectrum(peft_type: str, component: Component, weights: SiteWeights, more: dict[str, Any]) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    for here in sites:
        modules.add(here.path, {f"{peft_type.lower()}_spectrum": here.tensors["spectrum"]})
    counts = {here.path: here.size("spectrum") for here in sites}
    count = commonest(counts.values())
    return modules.form(
        peft_type,
        {
            "n_frequency": count,
            "n_frequency_pattern": patterns(counts, count, weights.spec),
            "scaling": plain(component.config["scale"]),
            "random_loc_seed": component.config["seed"],
            "fan_in_fan_out": weights.spec.conv1d,
            **more,
        },
    )


def c3a(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "C3A")
    for here in sites:
        modules.add(here.path, {"c3a_kernel": here.tensors["kernel"]})
    sizes = {here.path: here.size("kernel", 2) for here in sites}
    size = commonest(sizes.values())
    return modules.form(
        "C3A", {"block_size": size, "block_size_pattern": patterns(sizes, size, weights.spec)}
    )


def shira(component: Component, weights: SiteWeights) -> Form:
    """PEFT wants ``r (in + out)`` entries of every weight, and has no scale."""
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "SHIRA")
    ranks = []
    for here in sites:
        values, scale = here.tensors["values"], scale_of(component, here)
        if scale != 1.0:
            values = (values.to(torch.float32) * scale).to(values.dtype)
        modules.add(here.path, {"shira_weight": values, "shira_indices": here.tensors["indices"]})
        rank, rest = divmod(len(values), here.site.in_features + here.site.out_features)
        if rest or not rank:
            raise UnsupportedDelta(
                f"it has {len(values)} entries at {here.site.name}, where PEFT wants a multiple of "
                f"{here.site.in_features + here.site.out_features}",
                field=here.site.name,
            )
        ranks.append(rank)
    return modules.form("SHIRA", {"r": alike(ranks, "rank"), "mask_type": "random"})


def glora(component: Component, weights: SiteWeights) -> Form:
    """PEFT has one kind for A and B, one for C, one for D and E; of a pair, what is missing is zero."""
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "GLORA")
    kinds = {paths: _glora_kind(paths, sites) for paths in ("AB", "C", "DE")}
    for here in sites:
        parameters: dict[str, Tensor] = {}
        for paths, kind in kinds.items():
            # without a bias of the backbone's, what would change it is off
            kept = kind if paths == "AB" or here.site.bias else "none"
            for path in paths:
                for name, tensor in _glora_path(path, kept, here).items():
                    parameters[f"glora_{path}.{name}"] = tensor
        modules.add(here.path, parameters)
    ranks = [tensor.shape[0] for name, tensor in modules.tensors.items() if name.endswith(".Xu")]
    return modules.form(
        "GLORA",
        {
            "r": alike(ranks, "rank") if ranks else 1,
            "config_A_B": kinds["AB"],
            "config_C": kinds["C"],
            "config_D_E": kinds["DE"],
        },
    )


def _glora_kind(paths: str, sites: Iterable[Here]) -> str:
    found = set()
    for here in sites:
        for path in paths:
            if f"{path}.up" in here.tensors:
                found.add("lora")
            elif path in here.tensors:
                found.add("constant" if here.tensors[path].numel() == 1 else "vector")
    return str(alike(found, f"the form of {paths}")) if found else "none"


def _glora_path(path: str, kind: str, here: Here) -> dict[str, Tensor]:
    out, wide = here.site.out_features, here.site.in_features
    shape = {"A": (out, wide), "B": (out, wide), "C": (wide, 1), "D": (out,), "E": (out,)}[path]
    if kind == "none":
        return {"zeros": torch.zeros(shape)}
    if f"{path}.up" in here.tensors:
        return {"Xd": here.tensors[f"{path}.up"], "Xu": here.tensors[f"{path}.down"]}
    if path in here.tensors:
        return {"X": here.tensors[path]}
    if kind == "lora":
        rank = max(tensor.shape[0] for name, tensor in here.tensors.items() if name.endswith(".down"))
        return {"Xd": torch.zeros(shape[0], rank), "Xu": torch.zeros(rank, shape[1])}
    if kind == "constant":
        return {"X": torch.zeros(1)}
    return {"X": torch.zeros(shape[0], 1) if len(shape) == 2 else torch.zeros(shape)}


def peanut(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "PEANUT")
    parts = {"e": "encoders", "d": "decoders"}
    for here in sites:
        parameters = {}
        for name, tensor in here.tensors.items():
            layer = f"{parts[name[0]]}.{name[1:]}" if name[0] in parts else name
            parameters[f"peanut_{layer}.weight"] = tensor
        modules.add(here.path, parameters)
    return modules.form(
        "PEANUT",
        {
            "r": alike((here.size("A") for here in sites), "rank"),
            "depth": (alike((len(here.tensors) for here in sites), "depth") - 2) // 2,
            "act_fn": component.config["activation"],
            "scaling": component.config["scale"],
        },
    )


def unilora(component: Component, weights: SiteWeights) -> Form:
    """By its indices; one that a seed deals out must go to its sites in the order in which PEFT meets them."""
    spec, config, modules = weights.spec, component.config, Modules()
    theta = component.tensors["theta"]
    modules.tensors[f"{SHARED}unilora_theta_d"] = theta
    if config:
        ordered = [site.name for site in spec.in_module_order(spec.sites[name] for name in config["sites"])]
        if ordered != config["sites"]:
            raise UnsupportedDelta(
                "its seed deals the entries out in another order of the sites than PEFT does"
            )
        modules.paths += [Here(spec.sites[name], {}).path for name in ordered]
        rank = config["rank"]
    else:
        sites = sites_of(component, spec)
        for here in sites:
            modules.add(here.path, {f"unilora_{name}": tensor for name, tensor in here.tensors.items()})
        rank = alike((here.size("indices_A") for here in sites), "rank")
    return modules.form(
        "UNILORA",
        {
            "r": rank,
            "theta_d_length": len(theta),
            "proj_seed": config.get("seed", 42),
            "save_indices": not config,
            "fan_in_fan_out": spec.conv1d,
        },
    )


def tinylora(component: Component, weights: SiteWeights) -> Form:
    """Every module has a vector of its own; PEFT counts the seeds of their projections up from one."""
    sites, modules = sites_of(component, weights.spec), Modules()
    seeds = component.config.get("seeds", {})
    saved = alike(("P" in here.tensors for here in sites), "whether they have projections")
    first = 42 if saved else seeds[sites[0].site.name]
    for index, here in enumerate(sites):
        names = [name for name in ("A", "B", "P") if name in here.tensors]
        modules.add(here.path, {f"tinylora_{name}": here.tensors[name] for name in names})
        modules.tensors[f"{SHARED}tinylora_v.{index}"] = here.tensors["v"]
        if not saved and seeds[here.site.name] != first + index:
            raise UnsupportedDelta("its seeds do not count up by one from site to site, as PEFT's do")
    return modules.form(
        "TINYLORA",
        {
            "r": alike((here.size("A") for here in sites), "rank"),
            "u": alike((here.size("v") for here in sites), "number of trained values"),
            "weight_tying": 0.0,
            "projection_seed": first,
            "save_projection": saved,
            "fan_in_fan_out": weights.spec.conv1d,
        },
    )


def supertuning(component: Component, weights: SiteWeights) -> Form:
    """Of every weight PEFT changes a share ``1 - sparsity``, rounded down; it scales the factors by ``alpha / r``."""
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "SUPERTUNING")
    names = {
        "values": "supertuning_values",
        "indices": "supertuning_indices",
        "A": "supertuning_lora_A.weight",
        "B": "supertuning_lora_B.weight",
    }
    for here in sites:
        modules.add(here.path, {names[name]: tensor for name, tensor in here.tensors.items()})
    saved = alike(("indices" in here.tensors for here in sites), "whether they have indices")
    rank = alike((here.size("A") if "A" in here.tensors else None for here in sites), "rank")
    return modules.form(
        "SUPERTUNING",
        {
            "sparsity": _sparsity(sites),
            "select_top": component.config.get("largest", True),
            "save_precomputed_indices": saved,
            "r": rank,
            "lora_alpha": None if rank is None else plain(component.config["scale"] * rank),
        },
    )


def _sparsity(sites: Iterable[Here]) -> float:
    counts = [(here.site.in_features * here.site.out_features, here.size("values")) for here in sites]
    least = max(count / total for total, count in counts)
    most = min((count + 1) / total for total, count in counts)
    for digits in range(1, 16):
        sparsity = round(1 - (least + most) / 2, digits)
        if all(int(total * (1 - sparsity)) == count for total, count in counts):
            return sparsity
    raise UnsupportedDelta("its sites have shares of changed entries that no one sparsity gives")
