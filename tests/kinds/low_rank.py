"""Makers of random deltas that lower to low-rank additions at linears."""

from __future__ import annotations

import math

from deltas.sites import Site
from tests.kinds.draw import Draw, Made, Maker, Tensors, per_site

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


def _factors(draw: Draw, site: Site, rank: int) -> Tensors:
    return {"A": draw.normal(rank, site.in_features), "B": draw.normal(site.out_features, rank)}


def lora(draw: Draw) -> Made:
    sites, config = draw.linears(head=True), {"scale": draw.scale(), "scales": {}}
    tensors = per_site(sites, lambda s: _factors(draw, s, draw.size(1, 6)))
    config["scales"] = {draw.one_of(sites).name: draw.scale()}
    match draw.size(0, 4):
        case 0:
            tensors |= per_site(sites, lambda s: {"bias": draw.normal(s.out_features)})
        case 1 | 2 as variant:
            config["dora"] = "peft" if variant == 1 else "adapterhub"
            tensors |= per_site(sites, lambda s: {"magnitude": draw.gains(s.out_features) * 2})
        case 3:
            config["init"] = draw.one_of(["pissa", "olora"])
        case _:
            tensors |= per_site(draw.embeddings(), lambda s: _factors(draw, s, 3))
    return tensors, config


def adalora(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        rank = draw.size(1, 5)
        return _factors(draw, site, rank) | {"E": draw.normal(rank, 1, about=1.0)}

    return per_site(draw.linears(), tensors), {"scale": draw.scale()}


def vera(draw: Draw) -> Made:
    sites, rank, half = draw.linears(), draw.size(2, 6), 2 if draw.flip() else 1
    tensors = per_site(sites, lambda s: {"b": draw.normal(s.out_features), "d": draw.normal(half * rank)})
    config = {"probabilistic": True} if half == 2 else {}
    if draw.flip():
        return tensors, config | {"seed": draw.size(0, 1000)}
    shared = {
        "A": draw.normal(half * rank, max(s.in_features for s in sites)),
        "B": draw.normal(max(s.out_features for s in sites), rank),
    }
    return tensors | shared, config


def loha(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        rank = draw.size(1, 5)
        halves = (_factors(draw, site, rank), _factors(draw, site, rank))
        return {f"w{n}_{k}": half["B" if k == "a" else "A"] for n, half in enumerate(halves, 1) for k in "ab"}

    return per_site(draw.linears(), tensors), {"scale": draw.scale()}


def hra(draw: Draw) -> Made:
    sites = draw.linears()
    tensors = per_site(sites, lambda s: {"u": draw.normal(s.in_features, draw.size(1, 6))})
    return tensors, {"orthogonal": draw.flip()}


def delora(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        more = {"lambda": draw.normal(1, about=3.0), "norm": draw.gains(site.in_features)}
        return _factors(draw, site, draw.size(1, 5)) | more

    return per_site(draw.linears(), tensors), {}


def deft(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        parts = _factors(draw, site, draw.size(1, 4))
        return {"P": parts["B"], "R": parts["A"]} if put_in else {"P": parts["B"]}

    put_in = draw.flip()
    return per_site(draw.linears(), tensors), {"scale": draw.scale(), "orthogonal": draw.flip()}


def miss(draw: Draw) -> Made:
    bat = draw.flip()

    def tensors(site: Site) -> Tensors:
        if bat:
            size = draw.divisor(math.gcd(site.in_features, site.out_features), 8)
            return {"block": draw.normal(site.out_features // size, size, size)}
        width = site.out_features if draw.flip() else draw.divisor(site.out_features, 16)
        return {"block": draw.normal(draw.size(2, 7), width, std=0.1)}

    return per_site(draw.linears(), tensors), {}


def gralora(draw: Draw) -> Made:
    whole = draw.flip()

    def tensors(site: Site) -> Tensors:
        blocks = draw.divisor(math.gcd(site.in_features, site.out_features), 4)
        rank = blocks * draw.size(1, 3)
        found = {
            "A": draw.normal(blocks, site.in_features // blocks, rank),
            "B": draw.normal(blocks, rank, site.out_features // blocks),
        }
        general = _factors(draw, site, 2)
        return found | ({f"general_{name}": t for name, t in general.items()} if whole else {})

    return per_site(draw.linears(), tensors), {"scale": draw.scale()}


def mtl_lora(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        rank, tasks = draw.size(1, 5), draw.size(1, 3)
        return {
            "A": draw.normal(rank, site.in_features),
            "B": draw.normal(tasks, site.out_features, rank),
            "values": draw.gains(rank),
            "weights": draw.normal(tasks),
        }

    return per_site(draw.linears(), tensors), {"scale": draw.scale(), "sharpness": 0.5}


def dense_vera(draw: Draw) -> Made:
    """One shape of linears: their factors are shared."""
    first, rank, dora = draw.one_of(draw.linears()), draw.size(2, 5), draw.flip()
    alike = [s for s in draw.linears() if s.weight_shape == first.weight_shape] or [first]
    tensors = per_site(
        alike,
        lambda s: {
            "V": draw.normal(s.out_features, s.out_features, std=0.1),
            "U": draw.normal(rank, rank),
            **({"magnitude": draw.gains(s.out_features) * 2} if dora else {}),
        },
    )
    return tensors | _factors(draw, first, rank), {"scale": draw.scale()}


def gated_lora(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        gate = {"gate": draw.normal(1, site.in_features), "gate_bias": draw.normal(1)}
        return _factors(draw, site, draw.size(1, 5)) | gate

    return per_site(draw.looking_both_ways(draw.linears()), tensors), {}


def peanut(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        rank = draw.size(1, 5)
        layers = {f"{part}{n}": draw.normal(rank, rank) for n in range(draw.size(0, 2)) for part in "ed"}
        ends = {"A": draw.normal(rank, site.out_features), "B": draw.normal(site.out_features, rank)}
        return ends | layers

    return per_site(draw.linears(), tensors), {"scale": draw.scale(), "activation": draw.one_of(ACTIVATIONS)}


def tinylora(draw: Draw) -> Made:
    sites, count, rank = draw.linears(), draw.size(1, 5), draw.size(1, 3)
    tensors = per_site(sites, lambda s: _factors(draw, s, rank) | {"v": draw.normal(count)})
    if draw.flip():
        return tensors, {"seeds": {site.name: draw.size(0, 99) for site in sites}}
    return tensors | per_site(sites, lambda _: {"P": draw.normal(count, rank, rank)}), {}


def unilora(draw: Draw) -> Made:
    sites, rank, length = draw.linears(), draw.size(1, 4), draw.size(20, 60)
    theta = {"theta": draw.normal(length, std=2.0)}
    if draw.flip():
        return theta, {"seed": draw.size(0, 99), "rank": rank, "sites": [site.name for site in sites]}

    def tensors(site: Site) -> Tensors:
        factors = _factors(draw, site, rank)
        found: Tensors = {f"scales_{name}": tensor for name, tensor in factors.items()}
        for name, tensor in factors.items():
            found[f"indices_{name}"] = (
                draw.places(tensor.numel(), tensor.numel()).reshape(tensor.shape) % length
            )
        return found

    return theta | per_site(sites, tensors), {}


def vblora(draw: Draw) -> Made:
    sites = draw.linears()
    length = math.gcd(*(size for s in sites for size in s.weight_shape))
    length = draw.divisor(length, 16)
    vectors, topk, rank, by_logits = 9, draw.size(1, 3), draw.size(1, 3), draw.flip()

    def tensors(site: Site) -> Tensors:
        tiles = {"A": (rank, site.in_features // length), "B": (site.out_features // length, rank)}
        found: Tensors = {}
        for name, (rows, columns) in tiles.items():
            if by_logits:
                found[f"logits_{name}"] = draw.normal(rows, columns, vectors, std=1.0)
            else:
                count = rows * columns * topk
                found[f"indices_{name}"] = draw.places(count, count).reshape(rows, columns, topk) % vectors
                found[f"weights_{name}"] = draw.normal(rows, columns, topk - 1, about=0.3)
        return found

    return per_site(sites, tensors) | {"bank": draw.normal(vectors, length)}, {"topk": topk}


MAKERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        adalora, deft, delora, dense_vera, gated_lora, gralora, hra, loha, lora, miss, mtl_lora, peanut, tinylora,
        unilora, vblora, vera,
    )
}  # fmt: skip
