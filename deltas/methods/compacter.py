"""Compacter: a bottleneck whose projections are sums of Kronecker products (Karimi Mahabadi et al. 2021).

For ``side`` down or up and d pieces: ``x -> x H + b`` with ``H = sum_i R_i kron W_i`` ``[in, out]``.

Canonical tensors, each ``<site>/<name>`` or, shared by all sites, ``<name>``:

- the weights ``<side>`` ``[d, in/d, out/d]``, or their factors ``<side>_left`` ``[d, in/d, k]`` and
  ``<side>_right`` ``[d, k, out/d]``;
- the rule ``rule`` ``[d, d, d]``, or its factors ``rule_left`` ``[d, d, 1]`` and ``rule_right`` ``[d, 1, d]``;
  with ``<side>_`` in front where each side has its own.

The biases ``<site>/<side>_bias`` may be missing. Everything else is as in ``bottleneck``; config ``"sites"``
lists the sites where they have no tensors of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, expect
from deltas.methods.bottleneck import BottleneckAdapter
from deltas.methods.per_site import Loaded, Outlined, Shape
from deltas.patches import Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights

_SIDES = ("down", "up")
_RULES = ("rule", "rule_left", "rule_right")
_WEIGHTS = tuple(f"{side}{part}" for side in _SIDES for part in ("", "_left", "_right"))
_OWN_RULES = tuple(f"{side}_{rule}" for side in _SIDES for rule in _RULES)
_BIASES = ("down_bias", "up_bias")
_WIDEST = 8
"""The largest width, in hidden sizes: factors are small, what is formed of them need not be."""


class Compacter(BottleneckAdapter):
    """A bottleneck in hypercomplex form; its matrices are formed once, when it is lowered."""

    name = "compacter"
    required = ()
    optional = (*BottleneckAdapter.optional, *_BIASES, *_WEIGHTS, *_OWN_RULES, *_RULES)
    shared = (*_WEIGHTS, *_OWN_RULES, *_RULES)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().normalise({key: value for key, value in config.items() if key != "sites"})
        sites = config.get("sites")
        if sites is not None:
            if not isinstance(sites, list) or not sites or not all(isinstance(site, str) for site in sites):
                raise InvalidDelta("sites must be a list of names", field="sites")
            found["sites"] = sorted(set(sites))
        return found

    def check_factors(self, here: Outlined) -> None:
        hidden = here.site.out_features
        width = _check_side(here, "down", hidden, 0)
        if width > _WIDEST * hidden:
            raise UnsupportedDelta(
                f"a width of {width} at {here.site.name}; at most {_WIDEST} times {hidden} is served",
                field=here.site.name,
            )
        _check_side(here, "up", width, hidden)

    def factors(self, here: Loaded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        down, up = _formed(here, "down"), _formed(here, "up")
        biases = [here.tensors.get(f"{side}_bias") for side in _SIDES]
        zeros = [torch.zeros(matrix.shape[1]) for matrix in (down, up)]
        down_bias, up_bias = (zero if own is None else own for own, zero in zip(biases, zeros, strict=True))
        return down.T, down_bias, up.T, up_bias

    def rank(self, outline: Outline) -> int | None:
        widths = []
        for name, shape in outline.shapes.items():
            if name.rpartition("/")[2] in ("down", "down_right") and len(shape) == 3:
                widths.append(shape[0] * shape[2])
        return max(widths, default=None)

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        if "sites" not in component.config:
            return super().lower(component, weights)
        shared = {name: tensor.to(torch.float32) for name, tensor in component.tensors.items()}
        named = set(component.config["sites"])
        patches: list[Patch] = []
        for site in weights.spec.sites.values():
            if site.name in named:
                patches += self.lower_site(Loaded(site, {}, shared, component.config, weights))
        return patches

    def _sites(self, outline: Outline, spec: BackboneSpec) -> dict[Site, dict[str, Shape]]:
        named = outline.config.get("sites")
        if named is None:
            return super()._sites(outline, spec)
        if any("/" in name for name in outline.shapes):
            raise InvalidDelta("sites is for sites without tensors of their own", field="sites")
        wrong = [
            name for name in named if name not in spec.sites or spec.sites[name].kind is not SiteKind.BLOCK
        ]
        if wrong:
            raise InvalidDelta(f"this backbone has no block site {wrong[0]!r}", field="sites")
        return {site: {} for name, site in spec.sites.items() if name in named}


def _check_side(here: Outlined, side: str, into: int, out: int) -> int:
    """Refuses what does not fit ``into`` inputs and ``out`` outputs (0 for any); returns the outputs."""
    if _has(here, side):
        name, shape = _find(here, side)
        d, a, b = _three(name, shape)
    else:
        name, shape = _find(here, f"{side}_left")
        d, a, k = _three(name, shape)
        name, shape = _find(here, f"{side}_right")
        expect(name, shape, (d, k, 0))
        b = shape[2]
    if a * d != into or (out and b * d != out):
        raise InvalidDelta(
            f"{name!r}: {side} maps {a * d} to {b * d} features, not {into} to {out or 'any number'}",
            field=name,
        )
    for rules in ((f"{side}_rule", f"{side}_rule_left", f"{side}_rule_right"), _RULES):
        if _has(here, rules[0]):
            expect(*_find(here, rules[0]), (d, d, d))
            break
        if _has(here, rules[1]):
            expect(*_find(here, rules[1]), (d, d, 1))
            expect(*_find(here, rules[2]), (d, 1, d))
            break
    else:
        raise InvalidDelta(f"missing tensors: {here.site.name}/rule", field=f"{here.site.name}/rule")
    if f"{side}_bias" in here.shapes:
        here.expect(f"{side}_bias", b * d)
    return b * d


def _has(here: Outlined, name: str) -> bool:
    return name in here.shapes or name in here.shared


def _find(here: Outlined, name: str) -> tuple[str, Shape]:
    """The tensor's full name and shape: the site's own, else the shared one."""
    if name in here.shapes:
        return f"{here.site.name}/{name}", here.shapes[name]
    if name not in here.shared:
        full = f"{here.site.name}/{name}"
        raise InvalidDelta(f"missing tensors: {full}", field=full)
    return name, here.shared[name]


def _three(name: str, shape: Shape) -> tuple[int, int, int]:
    expect(name, shape, (0, 0, 0))
    d, a, b = shape
    return d, a, b


def _formed(here: Loaded, side: str) -> Tensor:
    """H ``[in, out]``."""
    tensors = {**here.shared, **here.tensors}

    def product(name: str) -> Tensor:
        if name in tensors:
            return tensors[name]
        return torch.bmm(tensors[f"{name}_left"], tensors[f"{name}_right"])

    own = any(f"{side}_{rule}" in tensors for rule in _RULES)
    rule, weight = product(f"{side}_rule" if own else "rule"), product(side)
    pieces = torch.einsum("dij,dab->iajb", rule, weight)  # the sum of the Kronecker products
    return pieces.reshape(pieces.shape[0] * pieces.shape[1], -1)
