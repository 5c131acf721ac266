"""What a method is, and the checks that every method shares. Nothing here needs a tensor's values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.patches import Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights

Shapes = Mapping[str, tuple[int, ...]]
"""Canonical tensor name (``<site>/<parameter>``) -> shape, as a file's header says."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A component as its files' configs and headers describe it, before any tensor is loaded."""

    method: str
    config: Mapping[str, Any]
    shapes: Shapes


class Method(Protocol):
    """How one kind of delta was made. Everything but ``lower`` works before any tensor is loaded."""

    @property
    def name(self) -> str: ...

    def normalise(self, config: Mapping[str, Any], /) -> dict[str, Any]:
        """The component's config in canonical form: known keys only, numbers as floats.

        Raises :class:`~deltas.errors.InvalidDelta` for unknown keys and wrong types.
        """
        ...

    def check(self, outline: Outline, spec: BackboneSpec, /) -> None:
        """Refuse tensors that do not fit this backbone. Raises ``InvalidDelta``/``UnsupportedDelta`` whose
        ``field`` is the canonical tensor name."""
        ...

    def claims(self, outline: Outline, /) -> frozenset[str]:
        """What only one component of a delta may hold, because two have no agreed meaning."""
        ...

    def rank(self, outline: Outline, /) -> int | None:
        """The largest rank or bottleneck width, None where the method has neither."""
        ...

    def lower(self, component: Component, weights: SiteWeights, /) -> list[Patch]:
        """Patches in float32, contiguous, in the order of a forward pass. ``weights`` has the spec too."""
        ...


@runtime_checkable
class HasIntegers(Protocol):
    """A method some of whose parameters are integers (int64), such as the indices of changed weights."""

    @property
    def integers(self) -> frozenset[str]:
        """The parameters' names, without the site."""
        ...

    def check_values(self, component: Component, spec: BackboneSpec, /) -> None:
        """Refuse indices outside what they index; called once the tensors are loaded.

        Raises ``InvalidDelta`` whose ``field`` is the canonical tensor name.
        """
        ...


def by_site(
    shapes: Shapes,
    required: tuple[str, ...],
    kinds: tuple[SiteKind, ...],
    spec: BackboneSpec,
    optional: tuple[str, ...] = (),
) -> dict[Site, dict[str, tuple[int, ...]]]:
    """Group shapes by site, in forward order, and refuse what does not belong.

    Every site must exist, be of one of ``kinds``, and have all ``required`` parameters and at least one in all; the
    ``optional`` ones may be there too.
    """
    known = (*required, *optional)
    grouped: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        site_name, _, parameter = name.rpartition("/")
        site = spec.sites.get(site_name)
        if site is None:
            raise InvalidDelta(f"{name!r}: this backbone has no site {site_name!r}", field=name)
        if site.kind not in kinds:
            wanted = " or ".join(kinds)
            raise InvalidDelta(f"{name!r}: {site_name} is a {site.kind} site, not {wanted}", field=name)
        if parameter not in known:
            raise InvalidDelta(f"{name!r}: unknown parameter; known: {', '.join(known)}", field=name)
        grouped.setdefault(site_name, {})[parameter] = shape
    for site_name, parameters in grouped.items():
        missing = [f"{site_name}/{parameter}" for parameter in required if parameter not in parameters]
        if missing:
            raise InvalidDelta(f"missing tensors: {', '.join(missing)}", field=missing[0])
    if not grouped:
        raise InvalidDelta("a component without tensors changes nothing", field="components")
    return {site: grouped[name] for name, site in spec.sites.items() if name in grouped}


def each_site(component: Component, spec: BackboneSpec) -> Iterator[tuple[Site, dict[str, Tensor]]]:
    """Every site of a checked component with its tensors, floats as float32, in forward order."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in component.tensors.items():
        site_name, _, parameter = name.rpartition("/")
        by_name.setdefault(site_name, {})[parameter] = tensor
    for site in spec.sites.values():
        if site.name in by_name:
            tensors = by_name[site.name]
            yield site, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def expect(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a shape that is not the expected one. In ``expected`` 0 stands for any size of 1 or more."""
    fits = len(shape) == len(expected) and all(
        size > 0 if wanted == 0 else size == wanted for size, wanted in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(str(size) if size else "n" for size in expected) + "]"
        raise InvalidDelta(f"{name!r} has shape {list(shape)}, expected {wanted}", field=name)


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """Refuse indices that are not in ``0 .. size-1``."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise InvalidDelta(f"{name!r} has indices outside 0 .. {size - 1}", field=name)


def only_keys(config: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse unknown config keys, by name."""
    unknown = sorted(set(config) - known)
    if unknown:
        raise InvalidDelta(
            f"unknown config key {ascii(unknown[0])[:200]}", field=ascii(unknown[0])[1:-1][:200]
        )


def number(value: object, field: str) -> float:
    """A finite number as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidDelta(f"{field} must be a number, not {type(value).__name__}", field=field)
    try:
        result = float(value)
    except OverflowError:
        raise InvalidDelta(f"{field} is too large", field=field) from None
    if not math.isfinite(result):
        raise InvalidDelta(f"{field} must be finite", field=field)
    return result
