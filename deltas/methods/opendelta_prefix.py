"""OpenDelta's prefixes in a T5, where they take relative position biases away.

Tensors and config are those of ``packed_prefix``, or of ``prefix`` without its config. In each stack the first layer
counts its prefix as tokens before the row's own; every later layer, from the first that has a prefix on, has no biases
at all. (OpenDelta 0.3.2, ``delta_models/prefix.py``: a layer with a prefix does not hand its biases to the next.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.methods.base import Outline
from deltas.methods.packed_prefix import PackedPrefix
from deltas.methods.prefix import Prefix
from deltas.patches import KVPrefix, Patch
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights

_PACKED = "stacks"
_PLAIN: Mapping[str, Any] = {"shifts_positions": False}


class OpenDeltaPrefix:
    """Keys and values before a row's own, in a T5."""

    name = "opendelta_prefix"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if _PACKED in config:
            return PackedPrefix().normalise(config)
        Prefix().normalise({**config, **_PLAIN})
        return {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        if spec.family != "t5":
            raise UnsupportedDelta(
                f"{self.name} is for T5; for {spec.family}: prefix, packed_prefix", field="method"
            )
        if _PACKED in outline.config:
            PackedPrefix().check(outline, spec)
            sites = [site for stack in outline.config[_PACKED].values() for site in stack]
        else:
            Prefix().check(replace(outline, config=_PLAIN), spec)
            sites = [name.rpartition("/")[0] for name in outline.shapes]
        for site in sites:
            if ".cross." in site:
                raise UnsupportedDelta(
                    f"{site}: OpenDelta's prefix of cross-attention takes the encoder's place or does nothing",
                    field=site,
                )

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        if _PACKED in component.config:
            plain = PackedPrefix().lower(component, weights)
        else:
            plain = Prefix().lower(replace(component, config=_PLAIN), weights)
        found = {patch.site: patch for patch in plain if isinstance(patch, KVPrefix)}
        return [patch for stack in ("encoder", "decoder") for patch in _stack(found, stack, weights.spec)]


def _stack(found: Mapping[str, KVPrefix], stack: str, spec: BackboneSpec) -> Iterator[KVPrefix]:
    """One stack's prefixes; empty ones where a layer only loses its biases."""
    sites = [
        s.name for s in spec.of_kind(SiteKind.KV) if s.name.startswith(stack) and ".cross." not in s.name
    ]
    nothing = torch.empty(0, spec.kv_heads, spec.head_dim)
    begun = False
    for number, site in enumerate(sites):
        begun = begun or site in found
        if begun:
            own = found.get(site, KVPrefix(site, nothing, nothing, shifts_positions=False))
            yield replace(own, shifts_positions=number == 0, unbiased=number > 0)
