"""Makers of random deltas that work on sublayers, on the embeddings, on attention, or after the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.sites import Site, SiteKind
from tests.kinds.draw import Draw, Made, Maker, Tensors, per_site

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu", "identity")


def _reads(draw: Draw) -> str:
    options = ["output", "output+residual", "residual", "inner"]
    return draw.one_of(options if draw.spec.pre_norm else [*options, "normed"])


def _config(draw: Draw) -> dict[str, Any]:
    return {"activation": draw.one_of(ACTIVATIONS), "reads": _reads(draw), "scale": draw.scale()}


def _options(draw: Draw, site: Site) -> Tensors:
    """What a bottleneck may have beside its factors."""
    found: Tensors = {}
    hidden = site.out_features
    if draw.flip():
        found["scaling"] = draw.gains(1 if draw.flip() else hidden)
    if draw.flip():
        found |= {"norm_before": draw.gains(hidden), "norm_before_bias": draw.normal(hidden)}
    return found


def _factors(draw: Draw, hidden: int, width: int) -> Tensors:
    return {
        "down": draw.normal(width, hidden),
        "down_bias": draw.normal(width),
        "up": draw.normal(hidden, width),
        "up_bias": draw.normal(hidden),
    }


def bottleneck(draw: Draw) -> Made:
    sites, config = draw.blocks(), _config(draw)
    tensors = per_site(sites, lambda s: _factors(draw, s.out_features, draw.size(1, 9)))
    if draw.flip():
        return tensors, config
    tensors |= per_site(sites, lambda s: _options(draw, s))
    if draw.flip():
        norm = per_site(
            sites,
            lambda s: {
                "norm_after": draw.gains(s.out_features),
                "norm_after_bias": draw.normal(s.out_features),
            },
        )
        tensors, config["norm_around"] = tensors | norm, draw.flip()
    if draw.flip():
        config["onto"] = _reads(draw)
    if draw.spec.kind == "encoder":
        gate = per_site(
            sites, lambda s: {"gate": draw.normal(1, s.out_features), "gate_bias": draw.normal(1)}
        )
        tensors |= gate if draw.flip() else {}
    return tensors, config


def low_rank_adapter(draw: Draw) -> Made:
    def tensors(site: Site) -> Tensors:
        hidden, width = site.out_features, draw.size(1, 9)
        return {
            "down_left": draw.normal(hidden, 1, std=1.0),
            "down_right": draw.normal(1, width, std=1.0),
            "down_bias": draw.normal(width),
            "up_left": draw.normal(width, 1, std=1.0),
            "up_right": draw.normal(1, hidden, std=1.0),
            "up_bias": draw.normal(hidden),
        }

    return per_site(draw.blocks(), tensors), _config(draw)


def compacter(draw: Draw) -> Made:
    sites, pieces, factored = draw.blocks(), 4, draw.flip()
    width = pieces * draw.size(1, 3)

    def side(name: str, into: int, out: int) -> Tensors:
        if not factored:
            return {name: draw.normal(pieces, into // pieces, out // pieces)}
        left, right = draw.normal(pieces, into // pieces, 1), draw.normal(pieces, 1, out // pieces)
        return {f"{name}_left": left, f"{name}_right": right}

    def tensors(site: Site) -> Tensors:
        hidden = site.out_features
        biases = {"down_bias": draw.normal(width), "up_bias": draw.normal(hidden)} if biased else {}
        rule = {} if shared else {"rule": draw.normal(pieces, pieces, pieces)}
        return side("down", hidden, width) | side("up", width, hidden) | rule | biases

    biased, shared = draw.flip(), draw.flip()
    found = per_site(sites, tensors)
    return found | ({"rule": draw.normal(pieces, pieces, pieces)} if shared else {}), _config(draw)


def fusion(draw: Draw) -> Made:
    count = draw.size(2, 3)

    def tensors(site: Site) -> Tensors:
        hidden = site.out_features
        found: Tensors = {}
        for j in range(count):
            parts = _factors(draw, hidden, draw.size(1, 6)) | _options(draw, site)
            found |= {f"{j}.{name}": tensor for name, tensor in parts.items()}
        for name in ("query", "key", "value"):
            found[name] = draw.normal(hidden, hidden, std=0.1)
        return found | {"query_bias": draw.normal(hidden), "key_bias": draw.normal(hidden)}

    part = [{"activation": draw.one_of(ACTIVATIONS), "scale": draw.scale()} for _ in range(count)]
    reads = {key: _reads(draw) for key in ("reads", "query_reads")}
    config = {"parts": part, **reads, "onto": "output", "around": draw.flip()}
    return per_site(draw.blocks(), tensors), config


def invertible(draw: Draw) -> Made:
    places = ("encoder.embed", "embed.norm", "embed")  # an encoder's embeddings end with their norm
    place = "encoder.embed.norm" if draw.spec.family == "bart" else None
    site = draw.spec.sites[place or next(name for name in places if name in draw.spec.sites)]
    first = site.out_features // 2
    second = site.out_features - first
    tensors: Tensors = {}
    for half, into, out in (("f", second, first), ("g", first, second)):
        width = draw.size(2, 8)
        tensors |= {
            f"{site.name}/{half}_down": draw.normal(width, into),
            f"{site.name}/{half}_down_bias": draw.normal(width),
            f"{site.name}/{half}_up": draw.normal(out, width),
            f"{site.name}/{half}_up_bias": draw.normal(out),
        }
    return tensors, {"activation": draw.one_of(ACTIVATIONS)}


def prompt(draw: Draw) -> Made:
    after = draw.spec.kind == "encoder" and "embed.positions" in draw.spec.sites and draw.flip()
    embeddings = draw.normal(draw.size(1, 6), draw.spec.hidden, std=0.5)
    return {"embeddings": embeddings}, {"after_norm": True} if after else {}


def _kv_sites(draw: Draw) -> list[Site]:
    return [s for s in draw.spec.of_kind(SiteKind.KV) if ".cross." not in s.name]


def _states(draw: Draw, length: int) -> Tensors:
    shape = (length, draw.spec.kv_heads, draw.spec.head_dim)
    return {"keys": draw.normal(*shape, std=1.0), "values": draw.normal(*shape, std=1.0)}


def prefix(draw: Draw) -> Made:
    length = draw.size(1, 5)
    return per_site(_kv_sites(draw), lambda s: _states(draw, length)), {"shifts_positions": draw.flip()}


def opendelta_prefix(draw: Draw) -> Made:
    length = draw.size(1, 5)
    return per_site(draw.some(_kv_sites(draw)), lambda s: _states(draw, length)), {}


def packed_prefix(draw: Draw) -> Made:
    spec, length, config = draw.spec, draw.size(1, 5), {"activation": draw.one_of(ACTIVATIONS)}
    stacks = _stacks(draw)
    tensors: Tensors = {}
    for name, sites in stacks.items():
        width = 2 * len(sites) * spec.kv_heads * spec.head_dim
        if draw.flip():
            tensors[f"{name}/flat"] = draw.normal(length * width, std=1.0)
            continue
        inner = draw.size(3, 8)
        tensors |= {
            f"{name}/tokens": draw.normal(length, 6, std=1.0),
            f"{name}/down": draw.normal(inner, 6, std=1.0),
            f"{name}/down_bias": draw.normal(inner),
            f"{name}/up": draw.normal(width, inner, std=1.0),
            f"{name}/up_bias": draw.normal(width),
        }
    if spec.kind == "encoder" and draw.flip():
        gated = [site for sites in stacks.values() for site in sites]
        for site in gated:
            rows = draw.size(1, 2)
            tensors |= {
                f"{site}/gate": draw.normal(rows, spec.hidden),
                f"{site}/gate_bias": draw.normal(rows),
            }
    return tensors, config | {"stacks": stacks, "length": length}


def _stacks(draw: Draw) -> Mapping[str, list[str]]:
    own = [site.name for site in _kv_sites(draw)]
    if draw.spec.kind != "encoder-decoder":
        return {"self_prefix": own}
    return {
        "encoder_prefix": [name for name in own if name.startswith("encoder.")],
        "self_prefix": [name for name in own if name.startswith("decoder.")],
        "cross_prefix": [s.name for s in draw.spec.of_kind(SiteKind.KV) if ".cross." in s.name],
    }


def head(draw: Draw) -> Made:
    count, widths = draw.size(1, 2), [draw.spec.hidden, draw.size(3, 9), draw.size(2, 5)]
    tensors: Tensors = {}
    for j in range(count):
        tensors[f"layers.{j}/weight"] = draw.normal(widths[j + 1], widths[j])
        if draw.flip():
            tensors[f"layers.{j}/bias"] = draw.normal(widths[j + 1])
    labels = [f"label{n}" for n in range(widths[count])]
    return tensors, {
        "kind": draw.one_of(["classify", "tag", "regress"]),
        "pooling": draw.one_of(["first", "last", "mean", "none"]),
        "activations": [draw.one_of(ACTIVATIONS) for _ in range(count)],
        "labels": labels if draw.flip() else None,
    }


MAKERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        bottleneck, compacter, fusion, head, invertible, low_rank_adapter, opendelta_prefix, packed_prefix, prefix,
        prompt,
    )
}  # fmt: skip
