"""A plan: which tensor of which file becomes which canonical tensor. What a reader makes before loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltas.delta import Component, Delta
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats.files import DeltaFiles, listed
from deltas.methods import Outline, check_outlines, method
from deltas.sites import BackboneSpec

Check = Callable[[str, object], None]
"""Refuses a config's value, given its key; returns if it may stand."""


@dataclass(frozen=True, slots=True)
class PlannedComponent:
    """One component; ``sources`` maps canonical tensor names to the names in the file."""

    method: str
    config: Mapping[str, Any]
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a reader learned from configs and header; ``weights`` is the file with the tensors."""

    format: str
    weights: str
    components: tuple[PlannedComponent, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


def execute(plan: Plan, files: DeltaFiles, spec: BackboneSpec) -> Delta:
    """Check coverage and shapes, then load. Nothing is loaded unless all of it will be used.

    Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`; where one tensor is at fault, ``field`` is its
    name in the file.
    """
    header = files.header(plan.weights)
    used = [source for part in plan.components for source in part.sources.values()]
    if len(used) != len(set(used)):
        raise InvalidDelta(f"{plan.weights}: a tensor is used twice", field=plan.weights)
    refuse_unknown([name for name in header.tensors if name not in set(used)], plan.weights)
    outlines = [
        Outline(
            part.method,
            method(part.method).normalise(part.config),
            {name: header.tensors[source].shape for name, source in part.sources.items()},
        )
        for part in plan.components
    ]
    _check(outlines, plan, spec)
    return assemble(plan, [outline.config for outline in outlines], files)


def assemble(plan: Plan, configs: Sequence[Mapping[str, Any]], files: DeltaFiles) -> Delta:
    """Load a plan's tensors; ``configs`` are the canonical ones. Raises as ``DeltaFiles.tensors`` does."""
    used = [source for part in plan.components for source in part.sources.values()]
    loaded = files.tensors(plan.weights, used)
    components = tuple(
        Component(part.method, config, {name: loaded[source] for name, source in part.sources.items()})
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


def _check(outlines: list[Outline], plan: Plan, spec: BackboneSpec) -> None:
    """Check, and speak of the file's tensor names rather than ours."""
    sources = {name: source for part in plan.components for name, source in part.sources.items()}
    try:
        check_outlines(outlines, spec)
    except DeltaError as error:
        source = sources.get(error.field or "")
        if source is None or source == error.field:
            raise
        raise type(error)(f"{listed([source])} ({error})", field=source) from None
