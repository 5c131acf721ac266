"""OpenDelta's bottlenecks (``adapter``, ``parallel_adapter``, ``compacter``, ``low_rank_adapter``) as components."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deltas.errors import InvalidDelta
from deltas.formats.header import Header, shown
from deltas.formats.opendelta.config import ACTIVATIONS
from deltas.formats.opendelta.placing import Standing, layers_of
from deltas.formats.plan import PlannedComponent

Parts = Mapping[str, Mapping[str, str]]

_LINEARS = {
    "down": "modulelist.down_proj.weight",
    "down_bias": "modulelist.down_proj.bias",
    "up": "modulelist.up_proj.weight",
    "up_bias": "modulelist.up_proj.bias",
}
# Delta type -> method, the name of OpenDelta's module, our tensor -> its tensor.
_METHODS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "adapter": ("bottleneck", "adapter", _LINEARS),
    "parallel_adapter": ("bottleneck", "parallel_adapter", _LINEARS),
    "compacter": (
        "compacter",
        "compactor",
        {
            f"{side}{ours}": f"{side}_sampler.{theirs}"
            for side in ("down", "up")
            for ours, theirs in (
                ("", "W"),
                ("_left", "W_left"),
                ("_right", "W_right"),
                ("_rule", "phm_rule"),
                ("_rule_left", "phm_rule_left"),
                ("_rule_right", "phm_rule_right"),
                ("_bias", "b"),
            )
        },
    ),
    "low_rank_adapter": (
        "low_rank_adapter",
        "low_rank_adapter",
        {
            f"{side}{ours}": f"{side}_sampler.{theirs}"
            for side in ("down", "up")
            for ours, theirs in (("_left", "W_left"), ("_right", "W_right"), ("_bias", "b"))
        },
    ),
}


def components(
    kind: str, options: Mapping[str, Any], standings: Iterable[Standing], parts: Parts
) -> Iterator[PlannedComponent]:
    """One component for what reads the same and is at different sites. ``options`` are the config's own keys."""
    method, name, tensors = _METHODS[kind]
    config = {"activation": ACTIVATIONS[options["non_linearity"].lower()], "scale": 1.0}
    for reads, group in layers_of(standings):
        sources = {
            f"{standing.at.site}/{ours}": parts[standing.path][f"{name}.{theirs}"]
            for standing in group
            for ours, theirs in tensors.items()
            if f"{name}.{theirs}" in parts[standing.path]
        }
        yield PlannedComponent(method, {**config, "reads": reads.value}, sources)


def check_shapes(kind: str, options: Mapping[str, Any], hidden: int, parts: Parts, header: Header) -> None:
    """The config's sizes and flags and the tensors must agree. Raises :class:`InvalidDelta`, naming the key."""
    for keys in parts.values():
        shapes = {tensor.partition(".")[2]: (key, header.tensors[key].shape) for tensor, key in keys.items()}
        match kind:
            case "adapter" | "parallel_adapter":
                _expect(shapes, _LINEARS["down"], 0, options["bottleneck_dim"], "bottleneck_dim")
            case "compacter":
                _compacter(options, hidden // options["reduction_factor"], shapes)
            case _:
                width = hidden // options["reduction_factor"]
                _expect(shapes, "down_sampler.W_right", 1, width, "reduction_factor")


_Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def _expect(shapes: _Shapes, tensor: str, dimension: int, size: int, field: str) -> None:
    if tensor not in shapes:
        return  # what is missing is refused by name later
    key, shape = shapes[tensor]
    if len(shape) <= dimension or shape[dimension] != size:
        raise InvalidDelta(
            f"{shown(key)} has shape {list(shape)}, where {field} makes it {size} in dimension {dimension}",
            field=field,
        )


def _compacter(options: Mapping[str, Any], width: int, shapes: _Shapes) -> None:
    pieces, rank = options["hypercomplex_division"], options["phm_rank"]
    expected: set[str] = set()
    for side in ("down", "up"):
        sampler = f"{side}_sampler"
        if options["factorized_phm_rule"]:
            expected |= {f"{sampler}.phm_rule_left", f"{sampler}.phm_rule_right"}
        else:
            expected.add(f"{sampler}.phm_rule")
        if options["factorized_phm"]:
            expected |= {f"{sampler}.W_left", f"{sampler}.W_right"}
            _expect(shapes, f"{sampler}.W_left", 2, rank, "phm_rank")
            _expect(shapes, f"{sampler}.W_left", 0, pieces, "hypercomplex_division")
        else:
            expected.add(f"{sampler}.W")
            _expect(shapes, f"{sampler}.W", 0, pieces, "hypercomplex_division")
        if options[f"use_bias_{side}_sampler"]:
            expected.add(f"{sampler}.b")
    last = "down_sampler.W_right" if options["factorized_phm"] else "down_sampler.W"
    _expect(shapes, last, 2, width // pieces, "reduction_factor")
    for tensor in sorted(set(shapes) ^ expected):
        problem = "is not in the file" if tensor in expected else "does not belong to it"
        raise InvalidDelta(
            f"the config makes a compacter of {', '.join(sorted(expected))}: {tensor} {problem}", field=tensor
        )
