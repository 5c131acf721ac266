"""PEFT's types that add a matrix made of smaller ones: AdaLoRA, VeRA, LoHa, LoKr, DeLoRA, MiSS and their kin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft_writer.form import (
    PREFIX,
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
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights

_CONV1D = "fan_in_fan_out"


def adalora(component: Component, weights: SiteWeights) -> Form:
    """PEFT scales by ``alpha / (init_r + 1e-5)`` and names the ranks that training kept."""
    sites, modules = sites_of(component, weights.spec), Modules()
    scales = {here.site.name: scale_of(component, here) for here in sites}
    most = max(here.size("A") for here in sites)
    scale = commonest(scales.values())
    ranks: dict[str, list[bool]] = {}
    for here in sites:
        values = here.tensors["E"]
        if scales[here.site.name] != scale:
            values = (values.to(torch.float64) * (scales[here.site.name] / scale)).to(values.dtype)
        modules.add(here.path, {"lora_A": here.tensors["A"], "lora_B": here.tensors["B"], "lora_E": values})
        rank = here.size("A")
        ranks[f"{here.path}.lora_E"] = [True] * rank + [False] * (most - rank)
    return modules.form(
        "ADALORA",
        {
            "init_r": most,
            "target_r": most,
            "lora_alpha": plain(scale * (most + 1e-5)),
            "rank_pattern": ranks if any(not all(kept) for kept in ranks.values()) else None,
            "total_step": 1,
            _CONV1D: weights.spec.conv1d,
        },
    )


def vera(component: Component, weights: SiteWeights) -> Form:
    """VERA, or PVERA, whose tensors have names of their own."""
    sites, modules = sites_of(component, weights.spec), Modules()
    probabilistic = bool(component.config.get("probabilistic"))
    name = "pvera" if probabilistic else "vera"
    for here in sites:
        modules.add(here.path, {f"{name}_lambda_b": here.tensors["b"], f"{name}_lambda_d": here.tensors["d"]})
    seed = component.config.get("seed")
    rows = alike((here.size("d") for here in sites), "rank")
    if seed is None:
        wide, tall = _widest(sites)
        modules.tensors[f"{SHARED}{name}_A"] = component.tensors["A"][:, :wide]
        modules.tensors[f"{SHARED}{name}_B"] = component.tensors["B"][:tall]
    return modules.form(
        name.upper(),
        {
            "r": rows // 2 if probabilistic else rows,
            "projection_prng_key": 0 if seed is None else seed,
            "save_projection": seed is None,
            _CONV1D: weights.spec.conv1d,
        },
    )


def loha(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "LOHA")
    for here in sites:
        modules.add(here.path, {f"hada_{name}": tensor for name, tensor in here.tensors.items()})
        alike((here.size("w1_a", 1), here.size("w2_a", 1)), "rank")
    ranks = {here.path: here.size("w1_a", 1) for here in sites}
    return modules.form("LOHA", _ranks_and_alphas(component, sites, ranks, weights.spec))


def lokr(component: Component, weights: SiteWeights) -> Form:
    """PEFT derives from r, and from how it factorises the sizes, which of a site's factors are whole."""
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "LOKR")
    both = any("w1_a" in here.tensors for here in sites)
    sizes = {here.path: (_outer(here, "w1"), _outer(here, "w2")) for here in sites}
    ranks: dict[str, int] = {}
    for here in sites:
        modules.add(here.path, {f"lokr_{name}": tensor for name, tensor in here.tensors.items()})
        (a, b), (c, d) = sizes[here.path]
        given = {here.size(name, 1) for name in ("w1_a", "w2_a") if name in here.tensors}
        rank = given.pop() if given else max(a, b, c, d)
        low = {"w1": both and rank < max(a, b) / 2, "w2": rank < max(c, d) / 2}
        if given or any((f"{name}_a" in here.tensors) != is_low for name, is_low in low.items()):
            raise UnsupportedDelta(
                f"PEFT has no rank that gives the factors of {here.site.name}", field=here.site.name
            )
        ranks[here.path] = rank
    return modules.form(
        "LOKR",
        {
            **_ranks_and_alphas(component, sites, ranks, weights.spec),
            "decompose_both": both,
            "decompose_factor": _decomposition(sites, sizes),
        },
    )


def delora(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "DELORA")
    for here in sites:
        names = {"norm": "delora_w_norm", "lambda": "delora_lambda", "A": "delora_A", "B": "delora_B"}
        modules.add(here.path, {names[name]: tensor for name, tensor in here.tensors.items()})
    return modules.form("DELORA", _ranks({here.path: here.size("A") for here in sites}, weights.spec))


def miss(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "MISS")
    config: dict[str, Any] = {"r": 0, "mini_r": 1, "init_weights": True}
    for here in sites:
        modules.add(here.path, {"miss_block": here.tensors["block"]})
    shapes = [here.tensors["block"].shape for here in sites]
    if alike((len(shape) for shape in shapes), "variant") == 3:
        config |= {"r": alike((shape[2] for shape in shapes), "rank"), "init_weights": "bat"}
    else:
        config["r"] = alike((shape[0] for shape in shapes), "rank")
        if any(here.size("block", 1) != here.site.out_features for here in sites):
            config |= {"mini_r": alike((shape[1] for shape in shapes), "width"), "init_weights": "mini"}
    return modules.form("MISS", config)


def gralora(component: Component, weights: SiteWeights) -> Form:
    """PEFT scales by ``alpha / (r + hybrid_r)``."""
    sites, modules = sites_of(component, weights.spec), Modules()
    names = {
        "A": "gralora_A",
        "B": "gralora_B",
        "general_A": "gralora_A_general.weight",
        "general_B": "gralora_B_general.weight",
    }
    for here in sites:
        modules.add(here.path, {names[name]: tensor for name, tensor in here.tensors.items()})
    rank = alike((here.size("A", 2) for here in sites), "rank")
    hybrid = alike((here.size("general_A") if "general_A" in here.tensors else 0 for here in sites), "rank")
    return modules.form(
        "GRALORA",
        {
            "r": rank,
            "hybrid_r": hybrid,
            "gralora_k": alike((here.size("A") for here in sites), "number of blocks"),
            "alpha": plain(component.config["scale"] * (rank + hybrid)),
            _CONV1D: weights.spec.conv1d,
        },
    )


def hira(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    for here in sites:
        start = "hira_embedding_" if here.site.kind is SiteKind.EMBEDDING else "hira_"
        modules.add(here.path, {f"{start}{name}": tensor for name, tensor in here.tensors.items()})
    ranks = _ranks({here.path: here.size("A") for here in sites}, weights.spec)
    return modules.form("HIRA", {**ranks, _CONV1D: weights.spec.conv1d})


def deft(component: Component, weights: SiteWeights) -> Form:
    """PEFT scales by ``alpha / r``."""
    sites, modules = sites_of(component, weights.spec), Modules()
    for here in sites:
        modules.add(here.path, {f"deft_{name}": tensor for name, tensor in here.tensors.items()})
    rank = alike((here.size("P", 1) for here in sites), "rank")
    scale = alike((scale_of(component, here) for here in sites), "scale")
    return modules.form(
        "DEFT",
        {
            "r": rank,
            "alpha": plain(scale * rank),
            "para": not alike(("R" in here.tensors for here in sites), "variant"),
            "decomposition_method": "qr" if component.config["orthogonal"] else "relu",
            _CONV1D: weights.spec.conv1d,
        },
    )


def randlora(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    for here in sites:
        modules.add(here.path, {f"randlora_{name}": tensor for name, tensor in here.tensors.items()})
    rank = alike((here.size("lambda") for here in sites), "rank")
    seed, sparsity = component.config.get("seed"), component.config.get("sparsity")
    if seed is None:
        for name in ("A", "B"):
            for start in (
                SHARED,
                *(f"{PREFIX}{path}." for path in modules.paths),
            ):  # PEFT repeats them
                modules.tensors[f"{start}randlora_{name}"] = component.tensors[name]
    return modules.form(
        "RANDLORA",
        {
            "r": rank,
            "randlora_alpha": plain(component.config["scale"] * rank),
            "projection_prng_key": 0 if seed is None else seed,
            "save_projection": seed is None,
            "sparse": sparsity == "sparse",
            "very_sparse": sparsity == "very sparse",
            _CONV1D: weights.spec.conv1d,
        },
    )


def vblora(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    names = {"logits": "vblora_logits_{}", "indices": "vblora_logits_{}_topk_indices"}
    names["weights"] = "vblora_logits_{}_topk_weights"
    for here in sites:
        parameters = {}
        for name, tensor in here.tensors.items():
            kind, _, factor = name.partition("_")
            parameters[names[kind].format(factor)] = tensor
        modules.add(here.path, parameters)
    bank = component.tensors["bank"]
    modules.tensors[f"{SHARED}vblora_vector_bank"] = bank
    kinds = {name.partition("_")[0] for here in sites for name in here.tensors}
    if "logits" in kinds and len(kinds) > 1:
        raise UnsupportedDelta("some of its mixtures are logits, others weights; PEFT has one or the other")
    first = "logits_A" if "logits" in kinds else "indices_A"
    return modules.form(
        "VBLORA",
        {
            "r": alike((here.size(first) for here in sites), "rank"),
            "num_vectors": bank.shape[0],
            "vector_length": bank.shape[1],
            "topk": component.config["topk"],
            "save_only_topk_weights": "logits" not in kinds,
            _CONV1D: weights.spec.conv1d,
        },
    )


def _ranks(ranks: Mapping[str, float], spec: BackboneSpec) -> dict[str, Any]:
    rank = commonest(ranks.values())
    return {"r": rank, "rank_pattern": patterns(ranks, rank, spec)}


def _ranks_and_alphas(
    component: Component, sites: Iterable[Here], ranks: Mapping[str, int], spec: BackboneSpec
) -> dict[str, Any]:
    """For a scale of ``alpha / r``."""
    alphas = {here.path: plain(scale_of(component, here) * ranks[here.path]) for here in sites}
    alpha = commonest(alphas.values())
    return {**_ranks(ranks, spec), "alpha": alpha, "alpha_pattern": patterns(alphas, alpha, spec)}


def _widest(sites: Iterable[Here]) -> tuple[int, int]:
    every = [here.site for here in sites]
    return max(site.in_features for site in every), max(site.out_features for site in every)


def _outer(here: Here, factor: str) -> tuple[int, int]:
    """The size of w1 or w2, whole or in two parts."""
    if factor in here.tensors:
        return here.size(factor, 0), here.size(factor, 1)
    return here.size(f"{factor}_a", 0), here.size(f"{factor}_b", 1)


def _decomposition(
    sites: Iterable[Here], sizes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
) -> int:
    """The ``decompose_factor`` by which PEFT would split the sites' sizes as they are split here."""
    splits = []
    for here in sites:
        (a, b), (c, d) = sizes[here.path]
        splits += [(here.site.out_features, (a, c)), (here.site.in_features, (b, d))]
    for factor in (-1, *sorted({size for _, (size, _) in splits})):
        if all(_split(size, factor) == parts for size, parts in splits):
            return factor
    raise UnsupportedDelta("PEFT has no factor by which it would split its sizes so")


def _split(size: int, factor: int) -> tuple[int, int]:
    """How PEFT makes two factors of a size: the given one where it divides, else the nearest to each other below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = 1
    for candidate in range(2, limit + 1):
        if candidate * candidate > size:
            break
        if size % candidate == 0:
            small = candidate
    return small, size // small
