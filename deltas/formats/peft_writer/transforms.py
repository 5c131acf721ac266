"""PEFT's types that rotate or scale a linear's input or output, or shift it: OFT, BOFT, HRA, RoAd, IA3, BEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft_writer.form import Form, Modules, alike, linears_only, sites_of, targets
from deltas.sites import SiteKind
from deltas.weights import SiteWeights


def oft(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "OFT")
    blocks: list[tuple[int, int]] = []  # of every site: the width that is rotated, and its blocks' size
    for here in sites:
        embedding = here.site.kind is SiteKind.EMBEDDING
        name = "oft_embedding_R.weight" if embedding else "oft_R.weight"
        modules.add(here.path, {name: here.tensors["Q"]})
        width = here.site.out_features if embedding else here.site.in_features
        size = (1 + math.isqrt(1 + 8 * here.size("Q", 1))) // 2
        blocks.append((width, size))
    config, terms = component.config, component.config.get("terms")
    return modules.form(
        "OFT",
        {
            **_oft_size(blocks),
            "use_cayley_neumann": terms is not None,
            "num_cayley_neumann_terms": 5 if terms is None else terms,
            "block_share": bool(config.get("shared")),
            "coft": "limit" in config,
            "eps": config.get("limit", 6e-5),
        },
    )


def boft(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "BOFT")
    for here in sites:
        modules.add(here.path, {"boft_R": here.tensors["R"], "boft_s": here.tensors["s"][:, None]})
    size, count = (_only({here.size("R", dimension) for here in sites}) for dimension in (3, 1))
    if size is None and count is None:
        raise UnsupportedDelta(
            "its sites differ in the blocks' size and in their number; in PEFT one is alike"
        )
    return modules.form(
        "BOFT",
        {
            "boft_block_size": size or 0,
            "boft_block_num": 0 if size else count,
            "boft_n_butterfly_factor": alike((here.size("R") for here in sites), "number of factors"),
        },
    )


def hra(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "HRA")
    for here in sites:
        modules.add(here.path, {"hra_u": here.tensors["u"]})
    rank = alike((here.size("u", 1) for here in sites), "rank")
    return modules.form("HRA", {"r": rank, "apply_GS": bool(component.config.get("orthogonal"))})


def road(component: Component, weights: SiteWeights) -> Form:
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "ROAD")
    for here in sites:
        modules.add(here.path, {f"road_{name}": tensor for name, tensor in here.tensors.items()})
    config = component.config
    return modules.form("ROAD", {"variant": f"road_{config['variant']}", "group_size": config["group"]})


def ia3(component: Component, weights: SiteWeights) -> Form:
    """Modules whose input is scaled are PEFT's feed-forward modules; parts of a fused linear are scaled together."""
    spec, modules = weights.spec, Modules()
    scale = component.config.get("scale", 1.0)
    outputs: dict[str, Tensor] = {}
    inputs: list[str] = []
    for here in sites_of(component, spec):
        if "input_gain" in here.tensors:
            inputs.append(here.path)
            modules.add(here.path, {"ia3_l": here.tensors["input_gain"][None]})
            continue
        site, gain = here.site, here.tensors["gain"]
        if scale != 1.0:
            gain = (gain.to(torch.float32) * scale).to(gain.dtype)
        if site.path not in outputs:
            outputs[site.path] = gain.new_ones(spec.by_path[site.path].out_features)
        outputs[site.path][site.offset : site.offset + site.out_features] *= gain
    if both := set(inputs) & set(outputs):
        raise UnsupportedDelta(f"it scales both input and output of {min(both)}; PEFT one of them")
    for path, gain in outputs.items():
        modules.add(path, {"ia3_l": gain[:, None]})
    # PEFT compares these with the ends of names, and wants them among the targets.
    ends = targets(inputs, spec, others=list(outputs))
    config: dict[str, Any] = {"feedforward_modules": ends, "fan_in_fan_out": spec.conv1d}
    return modules.form("IA3", config | {"target_modules": sorted({*ends, *targets(outputs, spec)})})


def beft(component: Component, weights: SiteWeights) -> Form:
    """Shifts of linears' outputs, which is what PEFT has for BitFit; a bias that replaces another is not this."""
    sites, modules = sites_of(component, weights.spec), Modules()
    linears_only(sites, weights.spec, "BEFT")
    for here in sites:
        if here.site.kind is not SiteKind.LINEAR:
            raise UnsupportedDelta(
                f"it shifts {here.site.name}; PEFT has such shifts (BEFT) for linears only",
                field=here.site.name,
            )
        modules.add(here.path, {"beft_bias": here.tensors["beta"][None]})
    return modules.form("BEFT", {})


def _only(values: set[int]) -> int | None:
    return next(iter(values)) if len(values) == 1 else None


def _oft_size(blocks: Sequence[tuple[int, int]]) -> dict[str, int]:
    """``r`` and ``oft_block_size``, one of them 0, by which PEFT would cut the widths into blocks as they are cut."""
    sizes = {size for _, size in blocks}
    size, count = _only(sizes), _only({width // size for width, size in blocks})
    if size is not None or count is not None:
        return {"r": 0 if size else count or 0, "oft_block_size": size or 0}
    for asked in range(min(sizes), max(sizes) + 1):
        if all(_adjusted(width, asked) == size for width, size in blocks):
            return {"r": 0, "oft_block_size": asked}
    raise UnsupportedDelta("its sites differ in the blocks' size as PEFT's do not")


def _adjusted(width: int, asked: int) -> int:
    """The block size that PEFT takes where the one asked for does not divide the width: the nearest that does."""
    if asked >= width:
        return width
    divisors = [size for size in range(1, width + 1) if width % size == 0]
    return min(divisors, key=lambda size: (abs(size - asked), size))
