"""Makers of random deltas that change weights densely, sparsely or by what multiplies them, and biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltas.sites import Site, SiteKind
from tests.kinds.draw import Draw, Made, Maker, Tensors, per_site


def bitfit(draw: Draw) -> Made:
    sites = [*draw.linears(head=True), *draw.norms()]
    return per_site(sites, lambda s: {"beta": draw.normal(s.out_features)}), {}


def boft(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        size = draw.one_of([m for m in (2, 4, 8) if site.in_features % (2 * m) == 0])
        blocks = site.in_features // size
        return {"R": draw.normal(draw.size(1, 2), blocks, size, size), "s": draw.gains(site.out_features)}

    return per_site(draw.linears(), tensors), {}


def c3a(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        size = draw.divisor(math.gcd(site.in_features, site.out_features), 8)
        return {"kernel": draw.normal(site.out_features // size, site.in_features // size, size, std=2.0)}

    return per_site(draw.linears(), tensors), {}


def dense(draw: Draw) -> Made:
    sites = [
        *draw.some(draw.linears(head=True), 3),
        *draw.norms(),
        *(draw.embeddings() if draw.flip() else []),
    ]
    tensors = per_site(sites, lambda s: {"matrix": draw.normal(*s.weight_shape, std=0.1)})
    return tensors | per_site(sites[:2], lambda s: {"beta": draw.normal(s.out_features)}), {}


def _places(draw: Draw, site: Site) -> Tensor:
    """Some hundredths of the weight's entries, or very few."""
    size = torch.Size(site.weight_shape).numel()
    share = draw.one_of([0.001, 0.02, 0.06])
    flat = draw.places(size, max(1, round(share * min(size, 1 << 20))))
    return torch.stack(torch.unravel_index(flat, site.weight_shape))


def diff_pruning(draw: Draw) -> Made:
    def weight(site: Site) -> Tensors:
        where = _places(draw, site)
        return {"indices": where, "values": draw.normal(where.shape[1], std=1.0)}

    def bias(site: Site) -> Tensors:
        where = draw.places(site.out_features, 3)[None]
        return {"bias_indices": where, "bias_values": draw.normal(3, std=1.0)}

    sites = [*draw.linears(head=True), *draw.norms(), *draw.embeddings()]
    return per_site(sites, weight) | per_site([*draw.linears(), *draw.norms()], bias), {}


def masking(draw: Draw) -> Made:
    sites = [*draw.linears(head=True), *draw.norms(), *draw.embeddings()]
    return per_site(sites, lambda s: {"indices": _places(draw, s)}), {}


def shira(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        where = _places(draw, site)
        return {"indices": where, "values": draw.normal(where.shape[1], std=1.0)}

    return per_site(draw.linears(head=True), tensors), {"scale": draw.scale()}


def supertuning(draw: Draw) -> Made:
    sites, given, wide = draw.linears(), draw.flip(), draw.flip()

    def tensors(site: Site) -> Tensors:
        count = draw.size(1, 50)
        found = {"values": draw.normal(count, std=1.0)}
        if given:
            found["indices"] = draw.places(torch.Size(site.weight_shape).numel(), count)
        if wide:
            found |= {"A": draw.normal(2, site.in_features), "B": draw.normal(site.out_features, 2)}
        return found

    return per_site(sites, tensors), {"scale": draw.scale()} | ({} if given else {"largest": draw.flip()})


def fourierft(draw: Draw) -> Made:
    """The values are sums over all frequencies, so they are drawn large."""
    sites = draw.linears()
    tensors = per_site(sites, lambda s: {"spectrum": draw.normal(draw.size(5, 60), std=4.0)})
    return tensors, {"scale": 10.0, "seed": draw.size(0, 99)}


def waveft(draw: Draw) -> Made:
    tensors = per_site(draw.linears(), lambda s: {"spectrum": draw.normal(draw.size(5, 60))})
    return tensors, {"scale": draw.scale(), "seed": draw.size(0, 99), "haar": draw.flip()}


def randlora(draw: Draw) -> Made:
    sites, rank = draw.linears(), draw.size(4, 12)
    small = {site.name: min(site.weight_shape) for site in sites}
    bases = {name: math.ceil(size / rank) for name, size in small.items()}
    tensors = per_site(
        sites,
        lambda s: {
            "lambda": draw.normal(rank, bases[s.name]),
            "gamma": draw.normal(bases[s.name], small[s.name], std=0.1),
        },
    )
    if draw.flip():
        sparsity = draw.one_of(["none", "sparse", "very sparse"])
        return tensors, {"scale": draw.scale(), "seed": draw.size(0, 99), "sparsity": sparsity}
    tallest = max(max(site.weight_shape) for site in sites)
    shared = {
        "A": draw.normal(rank, 1, max(small.values())),
        "B": draw.normal(tallest, max(bases.values()), rank),
    }
    return tensors | shared, {"scale": 0.5}


def glora(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        out, inner = site.weight_shape
        options: dict[str, list[tuple[int, ...]]] = {
            "A": [(out, inner), (out, 1), (1,)],
            "B": [(out, inner), (out, 1), (1,)],
            "C": [(inner, 1)],
            "D": [(out,), (1,)],
            "E": [(out,), (1,)],
        }
        found: Tensors = {}
        for path in draw.rng.sample("ABCDE", draw.size(2, 5)):
            shape = draw.one_of(options[path])
            if len(shape) == 2 and shape[1] > 1 and draw.flip():
                found[f"{path}.up"], found[f"{path}.down"] = draw.normal(out, 2), draw.normal(2, inner)
            else:
                found[path] = draw.normal(*shape, std=0.1)
        return (
            found | {"B": draw.normal(1, std=0.05)} if not {"A", "B", "B.up", "A.up"} & set(found) else found
        )

    return per_site(draw.linears(), tensors), {}


def hira(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        rank = draw.size(1, 4)
        return {"A": draw.normal(rank, site.in_features), "B": draw.normal(site.out_features, rank)}

    return per_site(draw.linears() if draw.flip() else draw.embeddings(), tensors), {}


def intrinsic(draw: Draw) -> Made:
    sites, biases = [*draw.linears(), *draw.norms()], [*draw.linears(), *draw.norms()]
    tensors = {"theta": draw.normal(draw.size(5, 200), std=0.1)}
    if draw.flip():
        tensors["scales"] = draw.gains(len(sites) + len(biases))
    names = {"sites": [s.name for s in sites], "biases": [s.name for s in biases]}
    return tensors, {"seed": draw.size(0, 1 << 40), "scale": draw.scale(), **names}


def lokr(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        a, b = draw.divisor(site.out_features, 8), draw.divisor(site.in_features, 8)
        shapes = {"w1": (a, b), "w2": (site.out_features // a, site.in_features // b)}
        found: Tensors = {}
        for name, (rows, columns) in shapes.items():
            if draw.flip():
                found[name] = draw.normal(rows, columns)
            else:
                found |= {f"{name}_a": draw.normal(rows, 2), f"{name}_b": draw.normal(2, columns)}
        return found

    return per_site(draw.linears(), tensors), {"scale": draw.scale()}


def oft(draw: Draw) -> Made:
    sites, config = draw.linears() if draw.flip() else draw.embeddings(), {}
    if draw.flip():
        config["terms"] = draw.size(2, 6)
    shared = draw.flip()
    if draw.flip():
        config["limit"] = 0.5

    def tensors(site: Site) -> Tensors:
        width = site.out_features if site.kind is SiteKind.EMBEDDING else site.in_features
        size = draw.divisor(width, 8)
        return {"Q": draw.normal(1 if shared else width // size, size * (size - 1) // 2, std=0.1)}

    return per_site(sites, tensors), config | ({"shared": True} if shared else {})


def road(draw: Draw) -> Made:
    variant, group = draw.one_of([1, 2, 4]), draw.one_of([2, 8, 16])

    def tensors(site: Site) -> Tensors:
        size = site.out_features * variant // 2
        return {"theta": draw.normal(size), "alpha": draw.gains(size)}

    return per_site(draw.linears(), tensors), {"variant": variant, "group": group}


def ia3(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        if draw.flip():
            return {"input_gain": draw.gains(site.in_features)}
        return {"gain": draw.gains(site.out_features)}

    return per_site(draw.linears(), tensors), {"scale": draw.scale()}


def gated_ia3(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        gate = {"gate": draw.normal(1, site.in_features), "gate_bias": draw.normal(1)}
        return gate | {"gain": draw.gains(site.out_features) * 2}

    return per_site(draw.looking_both_ways(draw.linears()), tensors), {}


def _absolute(draw: Draw, site: Site) -> Tensors:
    norm = site.kind is SiteKind.NORM
    found = {"weight": draw.gains(*site.weight_shape) if norm else draw.normal(*site.weight_shape)}
    if site.bias and draw.flip():
        found["bias"] = draw.normal(site.out_features)
    return found


def ln(draw: Draw) -> Made:
    return per_site(draw.norms(), lambda s: _absolute(draw, s)), {}


def override(draw: Draw) -> Made:
    sites = [
        *draw.some(draw.linears(head=True), 2),
        *draw.norms(),
        *(draw.embeddings() if draw.flip() else []),
    ]
    return per_site(sites, lambda s: _absolute(draw, s)), {}


def tokens(draw: Draw) -> Made:
    count = draw.size(5, 30)

    def made(site: Site) -> Tensors:
        embedding = site.kind is SiteKind.EMBEDDING
        rows, width = site.weight_shape if embedding else (site.out_features, site.in_features)
        most = min(count, rows)
        return {"indices": draw.places(rows, most), "rows": draw.normal(most, width)}

    sites = draw.embeddings()
    return per_site([*sites, draw.spec.sites["head"]] if draw.flip() else sites, made), {}


MAKERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        bitfit, boft, c3a, dense, diff_pruning, fourierft, gated_ia3, glora, hira, ia3, intrinsic, ln, lokr, masking,
        oft, override, randlora, road, shira, supertuning, tokens, waveft,
    )
}  # fmt: skip
