"""Compositions that ``save_adapter_setup`` writes: a folder per adapter, one per fusion, and ``adapter_setup.json``.

A stack of bottlenecks applies them in order, each reading what the one before left. A fusion mixes bottlenecks by
attention; the last one says what they read and what is added to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.adapterhub import bottleneck, places, single
from deltas.formats.adapterhub.keys import Keys
from deltas.formats.adapterhub.names import (
    ADAPTER_FILES,
    CONFIG,
    FUSION,
    FUSION_CONFIG,
    FUSION_FILES,
    HEAD_FILES,
    PICKLED_FUSION,
    SETUP,
    one_of_two,
)
from deltas.formats.files import DeltaFiles, listed
from deltas.formats.header import shown
from deltas.formats.plan import Check, Plan, PlannedComponent, absent, check_config, one_of, provenance
from deltas.formats.sources import Source
from deltas.patches import BlockInput
from deltas.sites import BackboneSpec

MAX_PARTS = 16

_FUSION_KEYS: Mapping[str, Check | None] = {
    "query": one_of(True, False),
    "key": one_of(True, False),
    "value": one_of(True, False),
    "query_before_ln": one_of(True, False),
    "residual_before": one_of(True, False),
    "temperature": absent,  # falls with every call, hence never the same twice
    # A linear map and a weighted mean can change places; the others are for training.
    "value_before_softmax": None,
    "regularization": None,
    "value_initialized": None,
    "dropout_prob": None,
}
_STACKED = ("bottleneck", "compacter", "packed_prefix")


@dataclass(frozen=True, slots=True)
class Fuse:
    """Adapters that are mixed."""

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return ",".join(self.names)


def plan(files: DeltaFiles, spec: BackboneSpec) -> Plan:
    """What to load. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the file, key or tensor."""
    blocks = _blocks(files.json(SETUP))
    _check_files(files, blocks)
    names = [name for block in blocks for name in ((block,) if isinstance(block, str) else block.names)]
    if len(set(names)) != len(names):
        raise UnsupportedDelta("an adapter is in the composition twice", field=SETUP)
    found: list[PlannedComponent] = []
    weights: list[str] = []
    repeats: dict[str, str] = {}
    for block in blocks:
        if isinstance(block, Fuse):
            planned, more, again = _fused(files, block, spec)
            found.append(planned)
        else:
            _, inner, keys = single.opened(files, spec, f"{block}/")
            _check_name(keys, block)
            found += single.components(inner, keys, f"{block}/{CONFIG}")
            more, again = [keys.file], keys.repeats
            if len(blocks) > 1:
                _check_stacked(inner, keys, found)
        weights += more
        repeats |= again
    if len(blocks) > 1:
        _check_together(found, spec)
    metadata = provenance(files.json(SETUP), ("version",)) | {"name": "+".join(names)[:200]}
    return Plan("adapterhub", files.join(weights), tuple(found), metadata, repeats=repeats)


def names(files: DeltaFiles) -> set[str]:
    """The names that may be files of the composition: those in folders; :func:`plan` looks at them."""
    return {name for name in files if "/" in name} | {SETUP}


def _blocks(setup: Mapping[str, Any]) -> list[str | Fuse]:
    """The composition's blocks, in order."""
    unknown = sorted(set(setup) - {"adapter_setup", "head_setup", "version"})
    if unknown:
        raise UnsupportedDelta(f"{SETUP}: unknown key {shown(unknown[0])}", field=unknown[0])
    if setup.get("head_setup"):
        raise UnsupportedDelta(f"{SETUP}: heads of compositions are not served", field="head_setup")
    kind, children = _node(setup.get("adapter_setup"))
    if kind == "Fuse":
        return [_fuse(children)]
    if kind != "Stack":
        raise UnsupportedDelta(
            f"{SETUP}: a composition of type {shown(kind)} is not served; served: Stack, Fuse",
            field="adapter_setup",
        )
    blocks: list[str | Fuse] = []
    for child in children:
        inner, below = _node(child)
        if inner == "Fuse":
            blocks.append(_fuse(below))
        elif inner == "single":
            blocks.append(_name(below))
        else:
            raise UnsupportedDelta(f"{SETUP}: {shown(inner)} in a Stack is not served", field="adapter_setup")
    return blocks


def _node(node: object) -> tuple[object, list[Any]]:
    if not isinstance(node, dict) or not isinstance(node.get("children"), list) or node.get("kwargs"):
        raise InvalidDelta(f"{SETUP}: a block has a type and children", field="adapter_setup")
    if not 0 < len(node["children"]) <= MAX_PARTS:
        raise InvalidDelta(f"{SETUP}: a block has 1 to {MAX_PARTS} children", field="adapter_setup")
    return node.get("type"), node["children"]


def _name(children: list[Any]) -> str:
    if len(children) != 1 or not isinstance(children[0], str) or not children[0]:
        raise InvalidDelta(f"{SETUP}: an adapter is a name", field="adapter_setup")
    return children[0]


def _fuse(children: list[Any]) -> Fuse:
    parts = []
    for child in children:
        kind, below = _node(child)
        if kind != "single":
            raise UnsupportedDelta(f"{SETUP}: {shown(kind)} in a Fuse is not served", field="adapter_setup")
        parts.append(_name(below))
    return Fuse(tuple(parts))


def _check_files(files: DeltaFiles, blocks: list[str | Fuse]) -> None:
    """No file may be ignored."""
    known = {SETUP}
    for block in blocks:
        for name in (block,) if isinstance(block, str) else block.names:
            known |= {f"{name}/{file}" for file in ADAPTER_FILES | HEAD_FILES}
        if isinstance(block, Fuse):
            known |= {f"{block.name}/{file}" for file in FUSION_FILES}
    extra = [name for name in files if "/" in name and name not in known]
    if extra:
        raise InvalidDelta(f"{listed(extra)}: not part of the composition in {SETUP}", field=SETUP)


def _check_name(keys: Keys, folder: str) -> None:
    if keys.name != folder:
        raise InvalidDelta(f"{folder}/{CONFIG} is of an adapter called {shown(keys.name)}", field="name")


def _check_stacked(inner: Mapping[str, Any], keys: Keys, found: list[PlannedComponent]) -> None:
    """In a stack of several, only what the library's order of operations leaves exact."""
    wrong = [part.method for part in found if part.method not in _STACKED]
    if wrong or inner.get("architecture") == "union":
        raise UnsupportedDelta(
            f"{keys.name}: a Stack of several is served for sequential bottlenecks and prefixes; of LoRAs the library "
            "feeds one's output to the next",
            field="adapter_setup",
        )
    if inner.get("is_parallel") or inner.get("original_ln_after") is False:
        raise UnsupportedDelta(
            f"{keys.name}: in a Stack the library drops what a parallel adapter, or one without original_ln_after, "
            "does not pass on",
            field="is_parallel" if inner.get("is_parallel") else "original_ln_after",
        )


def _check_together(found: list[PlannedComponent], spec: BackboneSpec) -> None:
    prefixes = [part for part in found if part.method == "packed_prefix"]
    if len(prefixes) > 1 and spec.family == "t5":
        raise UnsupportedDelta("two prefixes on a T5 shift its position bias twice", field="adapter_setup")


def _fused(
    files: DeltaFiles, block: Fuse, spec: BackboneSpec
) -> tuple[PlannedComponent, list[str], dict[str, str]]:
    """One fusion as a component, with the files that it needs and the tensors that they repeat."""
    reads: list[bottleneck.Read] = []
    weights: list[str] = []
    repeats: dict[str, str] = {}
    for name in block.names:
        _, inner, keys = single.opened(files, spec, f"{name}/")
        _check_name(keys, name)
        if inner.get("architecture") is not None:
            raise UnsupportedDelta(f"{name}: AdapterFusion is for bottlenecks", field="architecture")
        reads.append(bottleneck.read(inner, keys, f"{name}/{CONFIG}"))
        _check_fusible(reads[-1], name)
        weights.append(keys.file)
        repeats |= keys.repeats
    outer, options = _fusion_config(files, block)
    folder = f"{block.name}/"
    own = Keys.of(files, one_of_two(files, folder, FUSION, PICKLED_FUSION), outer, spec)
    sites = {name.rpartition("/")[0] for name in reads[0].sources}
    sources: dict[str, Source] = {}
    for j, part in enumerate(reads):
        if {name.rpartition("/")[0] for name in part.sources} != sites:
            raise UnsupportedDelta(
                f"{block.names[j]} is in other places than {block.names[0]}", field="adapter_setup"
            )
        for name, source in part.sources.items():
            site, _, parameter = name.rpartition("/")
            sources[f"{site}/{j}.{parameter}"] = source
    for location in bottleneck.LOCATIONS:
        for place in places.bottlenecks(location, spec):
            if place.site in sites:
                sources |= _attention(
                    own, f"{place.module}.adapter_fusion_layer.{own.name}", place.site, options
                )
    return (
        PlannedComponent("fusion", _canonical(reads, options), sources),
        [*weights, own.file],
        repeats,
    )


def _check_fusible(part: bottleneck.Read, name: str) -> None:
    config = part.config
    for option in ("use_gating", "ln_after", "inv_adapter", "phm_layer"):
        if config[option]:
            raise UnsupportedDelta(f"{name}: {option} is ignored or not served in a fusion", field=option)
    if not config["original_ln_after"]:
        raise UnsupportedDelta(f"{name}: a fusion needs original_ln_after", field="original_ln_after")


def _fusion_config(files: DeltaFiles, block: Fuse) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    where = f"{block.name}/{FUSION_CONFIG}"
    outer = files.json(where)
    options = outer.get("config")
    if not isinstance(options, dict):
        raise InvalidDelta(f"{where}: config must be an object", field="config")
    check_config(options, _FUSION_KEYS, where)
    if outer.get("adapter_names", list(block.names)) != list(block.names):
        raise InvalidDelta(f"{where}: adapter_names are others than in {SETUP}", field="adapter_names")
    missing = [key for key in _FUSION_KEYS if key not in options]
    if missing:
        raise InvalidDelta(f"{where}: config lacks {missing[0]}", field=missing[0])
    if not (options["query"] or options["key"] or options["value"]):
        raise UnsupportedDelta(f"{where}: a fusion without query, key and value", field="query")
    return outer, options


def _attention(own: Keys, stem: str, site: str, options: Mapping[str, Any]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name in ("query", "key", "value"):
        if options[name]:
            found[f"{site}/{name}"] = own.key(f"{stem}.{name}.weight")
            if name != "value":
                found[f"{site}/{name}_bias"] = own.key(f"{stem}.{name}.bias")
    return found


def _canonical(reads: list[bottleneck.Read], options: Mapping[str, Any]) -> dict[str, Any]:
    last = reads[-1]
    parallel = last.config["is_parallel"]
    if parallel and options["residual_before"]:
        raise UnsupportedDelta(
            "residual_before with parallel adapters is not served", field="residual_before"
        )
    # the library adds the residual once with the mixture and once after it where the adapters are parallel
    onto = BlockInput.OUTPUT_AND_RESIDUAL if parallel else last.around.onto
    before = options["query_before_ln"] and not parallel
    return {
        "parts": [{key: part.canonical[key] for key in ("activation", "scale")} for part in reads],
        "reads": last.around.reads.value,
        "onto": onto.value,
        "query_reads": (BlockInput.OUTPUT if before else last.around.reads).value,
        "around": options["residual_before"],
    }
