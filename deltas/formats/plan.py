"""A plan: which tensor of which file becomes which canonical tensor. What a reader makes before loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltas.delta import Component, Delta
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats.files import DeltaFiles, listed
from deltas.formats.frozen import Frozen, same
from deltas.formats.header import Header
from deltas.formats.sources import Source, info_of, name_of, tensor_of
from deltas.methods import Outline, check_outline, check_together, check_values, integers, method
from deltas.sites import BackboneSpec

Check = Callable[[str, object], None]
"""Refuses a config's value, given its key; returns if it may stand."""


@dataclass(frozen=True, slots=True)
class PlannedComponent:
    """One component; ``sources`` maps canonical tensor names to what they are made of."""

    method: str
    config: Mapping[str, Any]
    sources: Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a reader learned from configs and header; ``weights`` is the file with the tensors.

    ``copies`` are tensors of the file that only repeat the backbone's own, by their state-dict key; ``repeats`` those
    that repeat another of the file, and ``spare`` those that its library keeps for training alone.
    """

    format: str
    weights: str
    components: tuple[PlannedComponent, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    repeats: Mapping[str, str] = field(default_factory=dict)
    spare: frozenset[str] = frozenset()


def execute(plan: Plan, files: DeltaFiles, spec: BackboneSpec, frozen: Frozen | None = None) -> Delta:
    """Check coverage and shapes, then load. Nothing is loaded unless all of it will be used.

    ``frozen`` gives the backbone's own tensors, for files that repeat some. Raises :class:`InvalidDelta` or
    :class:`UnsupportedDelta`; where one tensor is at fault, ``field`` is its name in the file.
    """
    header = files.header(plan.weights)
    _check_coverage(plan, header)
    outlines = [
        Outline(
            part.method,
            method(part.method).normalise(part.config),
            {name: info_of(source, header).shape for name, source in part.sources.items()},
        )
        for part in plan.components
    ]
    _check(outlines, plan, spec)
    _check_dtypes(plan, header)
    _check_copies(plan, files, frozen)
    _check_repeats(plan, files)
    delta = assemble(plan, [outline.config for outline in outlines], files, frozen)
    check_values(delta, spec)
    return delta


def assemble(
    plan: Plan, configs: Sequence[Mapping[str, Any]], files: DeltaFiles, frozen: Frozen | None = None
) -> Delta:
    """Load a plan's tensors; ``configs`` are the canonical ones. Raises as ``DeltaFiles.tensors`` does."""
    names = [name_of(source) for part in plan.components for source in part.sources.values()]
    loaded = files.tensors(plan.weights, dict.fromkeys(name for name in names if name is not None))
    components = tuple(
        Component(
            part.method,
            config,
            {name: tensor_of(source, loaded, frozen) for name, source in part.sources.items()},
        )
        for part, config in zip(plan.components, configs, strict=True)
    )
    return Delta(components, plan.format, plan.metadata)


def refuse_unknown(names: list[str], file: str) -> None:
    """Refuse tensors that no rule maps: serving the delta without them would not be serving it."""
    if names:
        raise InvalidDelta(
            f"{file}: {len(names)} tensors mean nothing here: {listed(sorted(names))}", field=min(names)
        )


def check_config(config: Mapping[str, Any], checks: Mapping[str, Check | None], where: str) -> None:
    """Put every key of a library's config through its check; None is for keys that change nothing here.

    A key without an entry is refused: it may mean anything.
    """
    for key, value in config.items():
        if key not in checks:
            raise UnsupportedDelta(f"{where}: unknown key {listed([key])}", field=printable(key))
        check = checks[key]
        if check is not None:
            check(key, value)


def absent(key: str, value: object) -> None:
    """A check: the option must be off (null, false or empty)."""
    if value not in (None, False, [], {}):
        raise UnsupportedDelta(f"{key} is not served; it must be off", field=key)


def one_of(*allowed: object) -> Check:
    """A check: the value must be one of these, types included (``True`` is not ``1``)."""

    def check(key: str, value: object) -> None:
        if not any(type(value) is type(option) and value == option for option in allowed):
            wanted = ", ".join(repr(option) for option in allowed)
            raise UnsupportedDelta(f"{key} is {listed([str(value)])}; served: {wanted}", field=key)

    return check


def printable(text: str, limit: int = 200) -> str:
    """A client's string as plain characters, for ``field`` and metadata."""
    return ascii(text)[1:-1][:limit]


def provenance(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, str]:
    """Short informational strings of a config, kept as metadata and never followed."""
    found = {key: config.get(key) for key in keys}
    return {key: printable(value) for key, value in found.items() if isinstance(value, str) and value}


def _check_coverage(plan: Plan, header: Header) -> None:
    """Every tensor of the file is used, and as a whole once at most."""
    every = [source for part in plan.components for source in part.sources.values()]
    whole = [source for source in every if isinstance(source, str)]
    if len(whole) != len(set(whole)):
        raise InvalidDelta(f"{plan.weights}: a tensor is used twice", field=plan.weights)
    used = {name_of(source) for source in every} | set(plan.copies) | set(plan.repeats) | plan.spare
    refuse_unknown([name for name in header.tensors if name not in used], plan.weights)


def _check_dtypes(plan: Plan, header: Header) -> None:
    """Indices must be integers, everything else floats."""
    for part in plan.components:
        whole = integers(part.method)
        for name, source in part.sources.items():
            dtype = info_of(source, header).dtype
            if dtype.is_floating_point == (name.rpartition("/")[2] in whole):
                wanted = "an integer" if dtype.is_floating_point else "a float"
                shown = name_of(source) or name
                raise UnsupportedDelta(f"{listed([shown])} is {str(dtype)[6:]}, not {wanted}", field=shown)


def _check_copies(plan: Plan, files: DeltaFiles, frozen: Frozen | None) -> None:
    """What repeats the backbone's own tensors must equal them: else it would be a change that is not served."""
    for name, key in plan.copies.items():
        own = None if frozen is None else frozen(key)
        if own is None or not same(files.tensors(plan.weights, [name])[name], own):
            raise UnsupportedDelta(
                f"{listed([name])} is not the backbone's own {key}; a changed copy of it is not served",
                field=name,
            )


def _check_repeats(plan: Plan, files: DeltaFiles) -> None:
    """One tensor under several names has one value."""
    for name, original in plan.repeats.items():
        ours, theirs = (files.tensors(plan.weights, [key])[key] for key in (name, original))
        if not same(ours, theirs):
            raise InvalidDelta(
                f"{listed([name])} differs from {listed([original])}, whose repetition it is", field=name
            )


def _check(outlines: list[Outline], plan: Plan, spec: BackboneSpec) -> None:
    """Check, and speak of the file's tensor names rather than ours; components may have names in common."""
    for outline, part in zip(outlines, plan.components, strict=True):
        try:
            check_outline(outline, spec)
        except DeltaError as error:
            name = error.field or ""
            source = name_of(part.sources[name]) if name in part.sources else None
            if source is None or source == name:
                raise
            raise type(error)(f"{listed([source])} ({error})", field=source) from None
    check_together(outlines)
