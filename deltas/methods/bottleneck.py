"""Bottleneck adapters: ``h += s (U f(D z + d) + u)`` at block sites, ``z`` chosen by ``reads``.

Canonical tensors ``<site>/down`` ``[m, hidden]``, ``<site>/down_bias`` ``[m]``, ``<site>/up``
``[hidden, m]``, ``<site>/up_bias`` ``[hidden]``; config ``{"activation", "reads", "scale"}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, by_site, expect, number, only_keys
from deltas.patches import Activation, BlockInput, Bottleneck, Patch
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights

_PARAMETERS = ("down", "down_bias", "up", "up_bias")
_ACTIVATIONS = {activation.name.lower(): activation for activation in Activation}
_READS = {reads.value: reads for reads in BlockInput}


class BottleneckAdapter:
    """A two-layer perceptron beside or after a sublayer."""

    name = "bottleneck"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"activation", "reads", "scale"}))
        for key, known in (("activation", list(_ACTIVATIONS)), ("reads", list(_READS))):
            if config.get(key) not in known:
                raise InvalidDelta(f"{key} must be one of {', '.join(known)}", field=key)
        return {
            "activation": config["activation"],
            "reads": config["reads"],
            "scale": number(config.get("scale"), "scale"),
        }

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        for site, parameters in by_site(outline.shapes, _PARAMETERS, (SiteKind.BLOCK,), spec).items():
            expect(f"{site.name}/down", parameters["down"], (0, site.out_features))
            width = parameters["down"][0]
            expect(f"{site.name}/down_bias", parameters["down_bias"], (width,))
            expect(f"{site.name}/up", parameters["up"], (site.out_features, width))
            expect(f"{site.name}/up_bias", parameters["up_bias"], (site.out_features,))

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()  # several at one site apply in order

    def rank(self, outline: Outline) -> int | None:
        widths = (shape[0] for name, shape in outline.shapes.items() if name.endswith("/down"))
        return max(widths, default=None)

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        config, present = component.config, set(component.sites())
        patches: list[Patch] = []
        for site in weights.spec.of_kind(SiteKind.BLOCK):
            if site.name not in present:
                continue
            tensors = {name: t.to(torch.float32) for name, t in component.at(site.name).items()}
            patches.append(
                Bottleneck(
                    site.name,
                    down=tensors["down"].contiguous(),
                    down_bias=tensors["down_bias"].contiguous(),
                    up=(tensors["up"].T * config["scale"]).contiguous(),
                    up_bias=(tensors["up_bias"] * config["scale"]).contiguous(),
                    activation=_ACTIVATIONS[config["activation"]],
                    reads=_READS[config["reads"]],
                )
            )
        return patches
