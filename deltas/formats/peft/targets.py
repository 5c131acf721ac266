"""``target_modules``: which modules a config names, held against those that have tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import listed
from deltas.formats.header import shown
from deltas.formats.peft.reading import Reading
from deltas.sites import BackboneSpec, Site, SiteKind

TARGETS_MAX = 65_536
ALL_LINEAR = "all-linear"
_LAYER = re.compile(r"\.([0-9]+)\.")


def check_targets(targets: object, paths: Iterable[str], key: str = "target_modules") -> None:
    """``target_modules`` and the tensors must name the same modules, else one of them is ignored somewhere.

    A string is a regular expression there and is not evaluated here: the tensors alone decide.
    """
    if targets is None or isinstance(targets, str):
        return
    named, met = set(_names(targets, key)), set()
    for path in paths:
        suffixes = _suffixes(path) & named
        if not suffixes:
            raise InvalidDelta(f"there are tensors for {shown(path)}, which {key} does not name", field=key)
        met |= suffixes
    if named - met:
        raise InvalidDelta(
            f"{key} names {listed(sorted(named - met))}, for which there are no tensors", field=key
        )


def demand_targets(reading: Reading) -> None:
    """Every module of a layer that ``target_modules`` names must have tensors: with others missing, PEFT would go on with
    what it initialises there. Only lists of names can be held to that, and modules of layers, which every model has.
    """
    config, layers = reading.config, reading.config.get("layers_to_transform")
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not isinstance(targets, list) or not isinstance(excluded, list) or not reading.tuned:
        return
    if config.get("layers_pattern") or (layers is not None and reading.spec.kind == "encoder-decoder"):
        return
    named, out = set(_names(targets, "target_modules")), set(_names(excluded, "exclude_modules"))
    chosen = _numbers(layers, "layers_to_transform")
    missing = []
    for path, site in reading.spec.by_path.items():
        layer, ends = _LAYER.search(path), _suffixes(path)
        if layer is None or not ends & named or ends & out or site.name in reading.tuned:
            continue
        saved = any(path.endswith(name) for name in config.get("modules_to_save") or ())
        if not saved and (not chosen or int(layer[1]) in chosen):
            missing.append(path)
    if missing:
        raise InvalidDelta(
            f"{reading.file} holds no tensors for {listed(missing)}, which target_modules names",
            field="target_modules",
        )


def named_linears(config: Mapping[str, Any], spec: BackboneSpec) -> list[Site]:
    """The linears that a config means, in the order of the model's modules, for a file that cannot tell.

    Raises :class:`UnsupportedDelta` for a regular expression, or a choice of layers: list the modules' names.
    """
    targets = config.get("target_modules")
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if config.get(key) not in (None, [], ""):
            raise UnsupportedDelta(
                f"{key} beside tensors that do not say where they belong; list full names in target_modules",
                field=key,
            )
    linears = spec.in_module_order(s for s in spec.by_path.values() if s.kind is SiteKind.LINEAR)
    if targets == ALL_LINEAR:
        return [site for site in linears if site.name != "head"]
    if not isinstance(targets, list):
        raise UnsupportedDelta(
            f"target_modules must be a list of names or {ALL_LINEAR!r} where the tensors do not say where they belong",
            field="target_modules",
        )
    names = set(_names(targets, "target_modules"))
    check_targets(targets, [site.path for site in linears if _suffixes(site.path) & names])
    return [site for site in linears if _suffixes(site.path) & names]


def _names(targets: object, key: str) -> Sequence[str]:
    if (
        not isinstance(targets, list)
        or len(targets) > TARGETS_MAX
        or not all(isinstance(target, str) for target in targets)
    ):
        raise InvalidDelta(f"{key} must be a list of names or a string", field=key)
    return targets


def _numbers(layers: object, key: str) -> set[int]:
    """The layers that are chosen; none where all are."""
    every = [layers] if type(layers) is int else [] if layers is None else layers
    if not isinstance(every, list) or not all(type(layer) is int for layer in every):
        raise InvalidDelta(f"{key} must be a list of layer numbers", field=key)
    return set(every)


def _suffixes(path: str) -> set[str]:
    """The path itself and every part of it that starts after a dot."""
    return {path, *(path[match.end() :] for match in re.finditer(r"\.", path))}
