"""A task head: layers on the backbone's last hidden states, with labels of its own.

Canonical tensors ``layers.<j>/weight`` ``[out, in]`` and ``layers.<j>/bias`` ``[out]`` (optional). Config: ``kind``
(``classify``, ``tag``, ``regress``), ``pooling`` (``first``, ``last``, ``mean``, ``none``), ``activations`` (one a layer,
applied after it) and ``labels`` (one for each output of the last layer, or null).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, expect, only_keys
from deltas.patches import Activation, Head, Patch, Pooling
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights

KINDS = ("classify", "tag", "regress")
MAX_LAYERS = 4
MAX_LABELS = 65_536
_ACTIVATIONS = {activation.name.lower(): activation for activation in Activation}
_NAME = re.compile(r"layers\.(?P<layer>[0-9])/(?P<parameter>weight|bias)")


class HeadMethod:
    """Layers after the backbone."""

    name = "head"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"kind", "pooling", "activations", "labels"}))
        for key, known in (("kind", KINDS), ("pooling", tuple(Pooling))):
            if config.get(key) not in known:
                raise InvalidDelta(f"{key} must be one of {', '.join(known)}", field=key)
        activations, labels = config.get("activations"), config.get("labels")
        if (
            not isinstance(activations, list)
            or not 0 < len(activations) <= MAX_LAYERS
            or any(not isinstance(name, str) or name not in _ACTIVATIONS for name in activations)
        ):
            raise InvalidDelta(
                f"activations must be 1 to {MAX_LAYERS} of {', '.join(_ACTIVATIONS)}", field="activations"
            )
        if labels is not None and (
            not isinstance(labels, list)
            or len(labels) > MAX_LABELS
            or not all(isinstance(label, str) for label in labels)
        ):
            raise InvalidDelta("labels must be a list of strings or null", field="labels")
        return {
            "kind": config["kind"],
            "pooling": str(config["pooling"]),
            "activations": list(activations),
            "labels": None if labels is None else list(labels),
        }

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        for name in outline.shapes:
            if _NAME.fullmatch(name) is None:
                raise InvalidDelta(f"{name!r}: a head has layers.<j>/weight and layers.<j>/bias", field=name)
        width = spec.hidden
        count = len(outline.config["activations"])
        for j in range(count):
            weight, bias = f"layers.{j}/weight", f"layers.{j}/bias"
            if weight not in outline.shapes:
                raise InvalidDelta(f"missing tensor: {weight}", field=weight)
            expect(weight, outline.shapes[weight], (0, width))
            width = outline.shapes[weight][0]
            if bias in outline.shapes:
                expect(bias, outline.shapes[bias], (width,))
        extra = [n for n in outline.shapes if int(n[7]) >= count]
        if extra:
            raise InvalidDelta(f"{extra[0]!r} has no entry in activations", field=extra[0])
        labels = outline.config["labels"]
        if labels is not None and len(labels) != width:
            raise InvalidDelta(f"{len(labels)} labels for {width} outputs", field="labels")

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset({"the task head"})

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, _weights: SiteWeights) -> list[Patch]:
        tensors = component.tensors
        layers = []
        for j, activation in enumerate(component.config["activations"]):
            bias = tensors.get(f"layers.{j}/bias")
            layers.append(
                (
                    tensors[f"layers.{j}/weight"].float().contiguous(),
                    None if bias is None else bias.float().contiguous(),
                    _ACTIVATIONS[activation],
                )
            )
        labels = component.config["labels"]
        return [
            Head(
                tuple(layers), Pooling(component.config["pooling"]), None if labels is None else tuple(labels)
            )
        ]
