"""OpenDelta's prefixes, each layer's own or all made by one network, as a component."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import listed
from deltas.formats.header import Header, shown
from deltas.formats.opendelta.modules import Module
from deltas.formats.opendelta.names import Names
from deltas.formats.plan import PlannedComponent
from deltas.formats.sources import Derived, Source
from deltas.sites import BackboneSpec, SiteKind

_PAIR = {"keys": "prefix.past_key", "values": "prefix.past_value"}
_NETWORK = {
    "tokens": "reparams.wte.weight",
    "down": "reparams.control_trans.0.weight",
    "down_bias": "reparams.control_trans.0.bias",
    "up": "reparams.control_trans.2.weight",
    "up_bias": "reparams.control_trans.2.bias",
}
STACK = "prefix"  # one network for all layers, the encoder's and the decoder's


def component(
    options: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, str]],
    known: Mapping[str, Module],
    names: Names,
    header: Header,
    spec: BackboneSpec,
) -> PlannedComponent:
    """Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the key or tensor."""
    named = [module for module in known.values() if names.mean(module)]
    strangers = [module.path for module in named if not module.kv]
    if strangers:
        raise UnsupportedDelta(
            f"modified_modules names {listed(strangers)}, where no prefix is served; it may name self-attention",
            field="modified_modules",
        )
    sites = [module.kv for module in named]
    if len(set(sites)) != len(sites):
        raise UnsupportedDelta(
            "modified_modules puts two prefixes into one attention", field="modified_modules"
        )
    if options["reparameterize"]:
        planned = _network(options, parts, named, names, header, t5=spec.family == "t5")
    else:
        planned = _by_layer(options, parts, known, names, sites, header, spec)
    lacking = [site.name for site in spec.of_kind(SiteKind.KV) if site.name not in sites]
    if spec.kind == "decoder" and names.certain and lacking:
        raise UnsupportedDelta(
            f"a prefix in some layers only is not served on a decoder: none at {listed(lacking)}",
            field="modified_modules",
        )
    return planned


def _by_layer(
    options: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, str]],
    known: Mapping[str, Module],
    names: Names,
    sites: Iterable[str],
    header: Header,
    spec: BackboneSpec,
) -> PlannedComponent:
    sources: dict[str, Source] = {}
    for path, tensors in parts.items():
        site = known[path].kv if path in known else ""
        if not site:
            raise UnsupportedDelta(f"a prefix at {shown(path)} is not served", field=path)
        for ours, theirs in _PAIR.items():
            if theirs not in tensors:
                raise InvalidDelta(f"missing tensor: {path}.{theirs}", field=f"{path}.{theirs}")
            _check_length(tensors[theirs], options, header)
            sources[f"{site}/{ours}"] = Derived(tensors[theirs], shape=(-1, spec.kv_heads, spec.head_dim))
        _refuse(set(tensors) - set(_PAIR.values()), path)
    different = sorted({name.rpartition("/")[0] for name in sources} ^ set(sites))
    if names.certain and different:
        raise InvalidDelta(
            f"modified_modules and the tensors disagree about prefixes at {listed(different)}",
            field="modified_modules",
        )
    if spec.family == "t5":
        return PlannedComponent("opendelta_prefix", {}, sources)
    return PlannedComponent("prefix", {"shifts_positions": False}, sources)


def _network(
    options: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, str]],
    named: list[Module],
    names: Names,
    header: Header,
    *,
    t5: bool,
) -> PlannedComponent:
    if not names.certain or not named:
        raise UnsupportedDelta(
            "the layers that a reparameterised prefix is for are those of modified_modules, which names none that is "
            "known; use module names",
            field="modified_modules",
        )
    first = named[0].path
    if set(parts) != {first}:
        raise InvalidDelta(f"the network must be at {first}: the first of modified_modules", field=first)
    tensors = parts[first]
    missing = [f"{first}.{theirs}" for theirs in _NETWORK.values() if theirs not in tensors]
    if missing:
        raise InvalidDelta(f"missing tensors: {listed(missing)}", field=missing[0])
    _refuse(set(tensors) - set(_NETWORK.values()), first)
    _check_length(tensors[_NETWORK["tokens"]], options, header)
    for ours, key in (("tokens", "embed_dim"), ("down", "embed_dim"), ("up", "mid_dim")):
        shape = header.tensors[tensors[_NETWORK[ours]]].shape
        if shape[1:] != (options[key],):
            raise InvalidDelta(
                f"{shown(tensors[_NETWORK[ours]])} has shape {list(shape)}, but {key} is {options[key]}",
                field=key,
            )
    sources = {f"{STACK}/{ours}": tensors[theirs] for ours, theirs in _NETWORK.items()}
    config = {
        "stacks": {STACK: [module.kv for module in named]},
        "activation": "tanh",
        "length": options["prefix_token_num"],
    }
    return PlannedComponent("opendelta_prefix" if t5 else "packed_prefix", config, sources)


def _check_length(key: str, options: Mapping[str, Any], header: Header) -> None:
    shape, length = header.tensors[key].shape, options["prefix_token_num"]
    if len(shape) != 2 or shape[0] != length:
        raise InvalidDelta(
            f"{shown(key)} has shape {list(shape)}, but prefix_token_num is {length}",
            field="prefix_token_num",
        )


def _refuse(others: set[str], path: str) -> None:
    if others:
        name = f"{path}.{min(others)}"
        raise InvalidDelta(f"{shown(name)} does not belong to this kind of prefix", field=name)
