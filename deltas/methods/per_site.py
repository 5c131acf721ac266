"""What most methods share: tensors at sites, perhaps a few that all sites use, each site checked and lowered alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, expect, number, only_keys
from deltas.patches import Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tensors import tensors_of
from deltas.weights import SiteWeights

Shape = tuple[int, ...]

MAX_LOWERED = 1 << 30  # numbers of one component once lowered: 4 GiB in float32


@dataclass(frozen=True, slots=True)
class Outlined:
    """One site's share of a component before any tensor is loaded; ``shared`` are the shapes that have no site."""

    site: Site
    shapes: Mapping[str, Shape]
    shared: Mapping[str, Shape]
    config: Mapping[str, Any]

    def expect(self, parameter: str, *expected: int) -> Shape:
        """The parameter's shape. Refuses another than ``expected``, in which 0 stands for any size of 1 or more."""
        expect(f"{self.site.name}/{parameter}", self.shapes[parameter], expected)
        return self.shapes[parameter]

    def refuse(self, parameter: str, problem: str) -> InvalidDelta:
        """An error about one of the tensors."""
        name = f"{self.site.name}/{parameter}"
        return InvalidDelta(f"{name!r} has shape {list(self.shapes[parameter])}: {problem}", field=name)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One site's share of a loaded component: floats as contiguous float32, integers as they are."""

    site: Site
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    config: Mapping[str, Any]
    weights: SiteWeights

    def __getitem__(self, parameter: str) -> Tensor:
        return self.tensors[parameter]

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.tensors


class PerSite:
    """Base of the methods whose sites do not depend on one another. Subclasses say what a site has and does."""

    name = ""
    kinds: tuple[SiteKind, ...] = (SiteKind.LINEAR,)
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    shared: tuple[
        str, ...
    ] = ()  # tensors without a site; a method that needs them checks that they are there

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset())
        return {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        sites = self._sites(outline, spec)
        shared = {name: shape for name, shape in outline.shapes.items() if name in self.shared}
        outlined = [Outlined(site, shapes, shared, outline.config) for site, shapes in sites.items()]
        check_scales(outline.config, {site.name for site in sites})
        self.check_shared(shared, outlined, outline.config)
        for here in outlined:
            self.check_site(here)

    def check_shared(
        self, shared: Mapping[str, Shape], sites: list[Outlined], config: Mapping[str, Any]
    ) -> None:
        """Refuse tensors without a site that do not fit."""

    def check_site(self, here: Outlined) -> None:
        """Refuse shapes that do not fit the site."""
        raise NotImplementedError

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        shared = {name: _ready(component.tensors[name]) for name in self.shared if name in component.tensors}
        present = set(component.sites())
        patches: list[Patch] = []
        entries = 0
        for site in weights.spec.sites.values():
            if site.name in present:
                tensors = {name: _ready(tensor) for name, tensor in component.at(site.name).items()}
                here = list(self.lower_site(Loaded(site, tensors, shared, component.config, weights)))
                entries += sum(tensor.numel() for tensor in tensors_of(here))
                if (
                    entries > MAX_LOWERED
                ):  # a few numbers may stand for whole matrices: stop before memory ends
                    raise UnsupportedDelta(
                        f"{component.method}: as it is served it holds more than {MAX_LOWERED} numbers; "
                        "target fewer modules",
                        field=site.name,
                    )
                patches += here
        return patches

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        """Patches in float32, contiguous."""
        raise NotImplementedError

    def _sites(self, outline: Outline, spec: BackboneSpec) -> dict[Site, dict[str, Shape]]:
        """Shapes by site, in forward order; refuses what does not belong and what is missing."""
        grouped: dict[str, dict[str, Shape]] = {}
        known = (*self.required, *self.optional)
        for name, shape in outline.shapes.items():
            if name in self.shared:
                continue
            site_name, _, parameter = name.rpartition("/")
            site = spec.sites.get(site_name)
            if site is None:
                raise InvalidDelta(f"{name!r}: this backbone has no site {site_name!r}", field=name)
            if site.kind not in self.kinds:
                wanted = " or ".join(self.kinds)
                raise InvalidDelta(f"{name!r}: {site_name} is a {site.kind} site, not {wanted}", field=name)
            if parameter not in known:
                raise InvalidDelta(f"{name!r}: unknown parameter; known: {', '.join(known)}", field=name)
            grouped.setdefault(site_name, {})[parameter] = shape
        for site_name, parameters in grouped.items():
            missing = [f"{site_name}/{p}" for p in self.required if p not in parameters]
            if missing:
                raise InvalidDelta(f"missing tensors: {', '.join(missing)}", field=missing[0])
        if not grouped:
            raise InvalidDelta("a component without tensors changes nothing", field="components")
        return {site: grouped[name] for name, site in spec.sites.items() if name in grouped}


def _ready(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous() if tensor.is_floating_point() else tensor


def scales(config: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical ``scale``, and ``scales`` for the sites whose scale differs; absent where all are alike."""
    scale = number(config.get("scale"), "scale")
    exceptions = config.get("scales", {})
    if not isinstance(exceptions, Mapping):
        raise InvalidDelta("scales must be an object", field="scales")
    different = {str(site): number(value, "scales") for site, value in exceptions.items()}
    different = {site: value for site, value in different.items() if value != scale}
    return {"scale": scale, "scales": different} if different else {"scale": scale}


def check_scales(config: Mapping[str, Any], sites: set[str]) -> None:
    """Refuse a scale for a site that has no tensors."""
    for name in config.get("scales", {}):
        if name not in sites:
            raise InvalidDelta(f"scales names {name!r}, where there are no tensors", field="scales")


def scale_at(here: Loaded) -> float:
    """The site's scale."""
    return float(here.config.get("scales", {}).get(here.site.name, here.config["scale"]))


def whole(value: object, field: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
    """An integer from ``least`` to ``most``: a number that makes work or memory needs a ``most``."""
    if type(value) is not int or not least <= value <= most:
        raise InvalidDelta(f"{field} must be an integer from {least} to {most}", field=field)
    return value


def truth(value: object, field: str) -> bool:
    """True or False, nothing else."""
    if type(value) is not bool:
        raise InvalidDelta(f"{field} must be true or false", field=field)
    return value


def each(sites: Iterable[Outlined], parameter: str) -> Iterator[Shape]:
    """A parameter's shapes at the sites that have it."""
    return (here.shapes[parameter] for here in sites if parameter in here.shapes)
