"""A task head: layers on the backbone's last hidden states, with labels of its own.

Canonical tensors ``layers.<j>/weight`` ``[out, in]`` and ``layers.<j>/bias`` ``[out]`` (optional). Config: ``kind``
(``classify``, ``tag``, ``regress``), ``pooling`` (``first``, ``last``, ``mean``, ``none``), ``activations`` (one a layer,
applied after it) and ``labels`` (one for each output of the last layer, or null). ``layers.<j>/norm`` and
``layers.<j>/norm_bias`` ``[out]`` (both optional) are a layer norm behind layer j's activation, as in ModernBERT's heads;
``norm_eps`` is their epsilon, which only a head with norms has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, expect, only_keys
from deltas.patches import Activation, Head, HeadLayer, Patch, Pooling
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights

KINDS = ("classify", "tag", "regress")
MAX_LAYERS = 4
MAX_LABELS = 65_536
_ACTIVATIONS = {activation.name.lower(): activation for activation in Activation}
_NAME = re.compile(r"layers\.(?P<layer>[0-9])/(?P<parameter>weight|bias|norm|norm_bias)")


class HeadMethod:
    """Layers after the backbone."""

    name = "head"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"kind", "pooling", "activations", "labels", "norm_eps"}))
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
        found = {
            "kind": config["kind"],
            "pooling": str(config["pooling"]),
            "activations": list(activations),
            "labels": None if labels is None else list(labels),
        }
        if "norm_eps" in config:
            found["norm_eps"] = _epsilon(config["norm_eps"])
        return found

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        for name in outline.shapes:
            if _NAME.fullmatch(name) is None:
                raise InvalidDelta(
                    f"{name!r}: a head has layers.<j>/weight, layers.<j>/bias, layers.<j>/norm and layers.<j>/norm_bias",
                    field=name,
                )
        normed = any("/norm" in name for name in outline.shapes)
        if normed != ("norm_eps" in outline.config):
            raise InvalidDelta("a head has norm_eps if it has norms, and only then", field="norm_eps")
        width = spec.hidden
        count = len(outline.config["activations"])
        for j in range(count):
            weight, norm = f"layers.{j}/weight", f"layers.{j}/norm"
            if weight not in outline.shapes:
                raise InvalidDelta(f"missing tensor: {weight}", field=weight)
            expect(weight, outline.shapes[weight], (0, width))
            width = outline.shapes[weight][0]
            if f"{norm}_bias" in outline.shapes and norm not in outline.shapes:
                raise InvalidDelta(f"missing tensor: {norm}", field=norm)
            for vector in (f"layers.{j}/bias", norm, f"{norm}_bias"):
                if vector in outline.shapes:
                    expect(vector, outline.shapes[vector], (width,))
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
            bias, norm, norm_bias = (
                None if tensor is None else tensor.float().contiguous()
                for tensor in (tensors.get(f"layers.{j}/{name}") for name in ("bias", "norm", "norm_bias"))
            )
            weight = tensors[f"layers.{j}/weight"].float().contiguous()
            layers.append(
                HeadLayer(
                    weight,
                    bias,
                    _ACTIVATIONS[activation],
                    norm,
                    norm_bias,
                    component.config.get("norm_eps", 1e-5),
                )
            )
        labels = component.config["labels"]
        return [
            Head(
                tuple(layers), Pooling(component.config["pooling"]), None if labels is None else tuple(labels)
            )
        ]


def _epsilon(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InvalidDelta("norm_eps must be a number between 0 and 1", field="norm_eps")
    return float(value)
