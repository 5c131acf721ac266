"""What the trained methods share. Most train the very tensors that are stored, so both act by one way of lowering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS
from deltas.patches import Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tunable import Parameters
from deltas.tuned.options import Option, complete
from deltas.tuned.targets import chosen
from deltas.weights import SiteWeights


class Trained:
    """Base of the methods whose parameters are the stored tensors, as float32. Subclasses say where they begin."""

    name = ""
    stored = ""  # the name under which METHODS has what is kept, where it is not the method's own
    learning_rate = 1e-3
    known: tuple[Option, ...] = ()
    kinds: tuple[SiteKind, ...] = (SiteKind.LINEAR,)
    where = ""  # the default targets, in words

    @property
    def method(self) -> str:
        """The stored form's method."""
        return self.stored or self.name

    def options(self, given: Mapping[str, Any], spec: BackboneSpec, /) -> dict[str, Any]:
        found = complete(given, self.known, self.name)
        self.settle(found, spec)
        return found

    def settle(self, options: dict[str, Any], spec: BackboneSpec, /) -> None:
        """Fill in what depends on the backbone; refuse what does not go together, as :meth:`options` does."""

    def sites(self, targets: Sequence[str] | None, spec: BackboneSpec, /) -> list[Site]:
        sites = self.usual(spec) if targets is None else chosen(targets, spec, self.kinds, self.name)
        if not sites:
            refused = next((site.refused for site in spec.of_kind(*self.kinds) if site.refused), "")
            raise InvalidDelta(
                f"{self.name} has no usual targets in {spec.family}: {refused or 'name some'}",
                field="targets",
            )
        return sites

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        """The method's own choice of sites."""
        raise NotImplementedError

    def start(
        self, options: Mapping[str, Any], sites: Sequence[Site], weights: SiteWeights, rng: torch.Generator, /
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def resume(self, component: Component, _options: Mapping[str, Any], /) -> dict[str, Tensor]:
        self.check_stored(component)
        return {name: tensor.detach().float().clone() for name, tensor in component.tensors.items()}

    def stored_sites(self, component: Component, spec: BackboneSpec, /) -> list[Site]:
        return [spec.sites[name] for name in spec.sites if name in component.sites()]

    def check_stored(self, component: Component) -> None:
        """Refuse a component of another method."""
        if component.method != self.method:
            raise UnsupportedDelta(
                f"{self.name} cannot go on from a component of {component.method}", field="init_from"
            )

    def config(self, _options: Mapping[str, Any], _sites: Sequence[Site], /) -> dict[str, Any]:
        """The stored form's config."""
        return {}

    def patches(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        weights: SiteWeights,
        _rng: torch.Generator | None,
        /,
    ) -> list[Patch]:
        return METHODS[self.method].lower(self.form(parameters, options, sites), weights)

    def penalty(self, _parameters: Parameters, _options: Mapping[str, Any], /) -> Tensor | None:
        return None

    def component(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        /,
    ) -> Component:
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in parameters.items()}
        return self.form(kept, options, sites)

    def form(self, parameters: Parameters, options: Mapping[str, Any], sites: Sequence[Site]) -> Component:
        """A component of these very tensors."""
        config = METHODS[self.method].normalise(self.config(options, sites))
        return Component(self.method, config, parameters)


def require(options: Mapping[str, Any], component: Component, *names: str) -> None:
    """Refuse to go on from a component whose config differs in what the options fix."""
    for name in names:
        if component.config.get(name) != options.get(name):
            raise UnsupportedDelta(
                f"init_from has {name} {component.config.get(name)!r}, the job {options.get(name)!r}: give it the same",
                field=name,
            )


def normal(rng: torch.Generator, deviation: float, *shape: int) -> Tensor:
    """Normally distributed numbers with mean 0."""
    return torch.randn(*shape, generator=rng) * deviation
