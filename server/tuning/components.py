"""What a job trains: parameters of one or more methods, beside a frozen delta or from where an earlier one ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltas import methods
from deltas.compose import combine
from deltas.delta import Component, Delta
from deltas.formats import native
from deltas.patches import Patch
from deltas.sites import Site
from deltas.tunable import Tunable
from deltas.tuned import tunable
from deltas.weights import SiteWeights
from server.errors import InvalidRequest
from server.tuning.spec import InitFrom, JobSpec, MethodSpec


@dataclass(frozen=True, eq=False)
class Trained:
    """One method's share. ``parameters`` are float32 leaves that require gradients."""

    method: Tunable
    options: Mapping[str, Any]
    sites: list[Site]
    parameters: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Components:
    """All that makes a job's delta: ``frozen`` is an earlier one's, as it is."""

    trained: list[Trained]
    frozen: tuple[Component, ...]
    frozen_patches: list[list[Patch]]
    weights: SiteWeights

    def named(self) -> dict[str, Tensor]:
        """Every parameter by ``<component>/<name>``."""
        return {
            f"{n}/{name}": p for n, part in enumerate(self.trained) for name, p in part.parameters.items()
        }

    def patches(self, rng: torch.Generator | None) -> list[Patch]:
        """What a row goes through, joined; ``rng`` as :class:`~deltas.tunable.Tunable` has it."""
        own = [
            part.method.patches(part.parameters, part.options, part.sites, self.weights, rng)
            for part in self.trained
        ]
        return combine([*self.frozen_patches, *own])

    def penalty(self) -> Tensor | None:
        """What the methods add to the loss, if they do."""
        found = [part.method.penalty(part.parameters, part.options) for part in self.trained]
        known = [penalty for penalty in found if penalty is not None]
        return torch.stack(known).sum() if known else None

    def delta(self) -> Delta:
        """The delta as it is now."""
        own = (
            part.method.component(part.parameters, part.options, part.sites, self.weights)
            for part in self.trained
        )
        return Delta((*self.frozen, *own))


def components_of(spec: JobSpec, weights: SiteWeights, device: torch.device) -> Components:
    """A job's components before the first step. Raises :class:`~deltas.errors.DeltaError`, :class:`InvalidRequest`."""
    rng = torch.Generator().manual_seed(spec.seed)
    earlier: list[Component] = []
    frozen: tuple[Component, ...] = ()
    if spec.init_from is not None:
        found = _earlier(spec.init_from)
        methods.check(found, weights.spec)
        methods.check_values(found, weights.spec)
        if spec.init_from.frozen:
            frozen = found.components
        else:
            earlier = list(found.components)
    trained = [_trained(method, earlier, weights, rng, device) for method in spec.methods]
    if earlier:
        raise InvalidRequest(
            f"init_from has a component of {earlier[0].method} that no method of the job goes on with: name one, or "
            "freeze it",
            param="init_from",
        )
    lowered = [methods.METHODS[part.method].lower(part, weights) for part in frozen]
    return Components(trained, frozen, lowered, weights)


def _earlier(init: InitFrom) -> Delta:
    found = native.load(Path(init.file))
    if found.digest != init.digest:
        raise InvalidRequest(
            f"{init.name} is not the delta that the job was submitted with", param="init_from"
        )
    return found


def _trained(
    spec: MethodSpec,
    earlier: list[Component],
    weights: SiteWeights,
    rng: torch.Generator,
    device: torch.device,
) -> Trained:
    """A method's share: from the first of the ``earlier`` components that it stored, which is taken, else new."""
    method = tunable(spec.method)
    for component in earlier:
        if component.method == method.method:
            earlier.remove(component)
            sites = method.stored_sites(component, weights.spec)
            start = method.resume(component, spec.options)
            break
    else:
        sites = [_site(name, weights) for name in spec.targets]
        start = method.start(spec.options, sites, weights, rng)
    parameters = {name: p.to(device, torch.float32).clone().requires_grad_() for name, p in start.items()}
    return Trained(method, spec.options, sites, parameters)


def _site(name: str, weights: SiteWeights) -> Site:
    site = weights.spec.sites.get(name)
    if site is None:
        raise InvalidRequest(f"the backbone has no site {name!r}", param="methods")
    return site
