"""Prompt tuning: trained embeddings put before a row's own tokens, whose positions they shift.

Canonical tensor ``embeddings`` ``[n, hidden]``. Config ``{}``, or ``{"after_norm": true}`` for prompts that are put after
an encoder's embedding norm, where they have no positions of their own. Such a backbone has a table of positions that
are added before the norm; with rotary positions every token has one, and no library says which a prompt has there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import Outline, expect, only_keys
from deltas.patches import Patch, SoftPrompt
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights

POSITIONS = "positions"
"""The claim of whatever shifts the positions of a row's own tokens."""


class Prompt:
    """A soft prompt."""

    name = "prompt"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"after_norm"}))
        after_norm = config.get("after_norm", False)
        if type(after_norm) is not bool:
            raise InvalidDelta("after_norm must be true or false", field="after_norm")
        return {"after_norm": True} if after_norm else {}

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        shapes = outline.shapes
        unknown = sorted(set(shapes) - {"embeddings"})
        if unknown:
            raise InvalidDelta(f"{unknown[0]!r}: a soft prompt has only 'embeddings'", field=unknown[0])
        if "embeddings" not in shapes:
            raise InvalidDelta("missing tensor: embeddings", field="embeddings")
        expect("embeddings", shapes["embeddings"], (0, spec.hidden))
        if outline.config.get("after_norm") and not {"embed.norm", "embed.positions"} <= spec.sites.keys():
            raise UnsupportedDelta(
                f"a prompt after the embedding norm needs positions that are added before it; {spec.family} has none",
                field="after_norm",
            )
        length = shapes["embeddings"][0]
        if length >= spec.max_positions:
            raise InvalidDelta(
                f"{length} virtual tokens leave no room in a context of {spec.max_positions}",
                field="embeddings",
            )

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset({POSITIONS})

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, _weights: SiteWeights) -> list[Patch]:
        embeddings = component.tensors["embeddings"].to(torch.float32).contiguous()
        return [SoftPrompt(embeddings, component.config.get("after_norm", False))]
