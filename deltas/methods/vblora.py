"""VB-LoRA: ``y += B A x`` where A and B are tiled from the vectors of one bank, each tile a mixture of the k best.

Canonical: the shared tensor ``bank`` ``[N, L]``, and for each of A (tiles ``[r, in/L]``) and B (tiles ``[out/L,
r]``) either ``<site>/logits_A`` ``[tiles, N]``, of which the k largest are mixed by their softmax, or
``<site>/indices_A`` ``[tiles, k]`` and ``<site>/weights_A`` ``[tiles, k - 1]``, the last weight being the rest of
1. Config ``{"topk": k}``. (Li et al. 2024, "VB-LoRA".)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, check_indices, expect, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, Shape, whole
from deltas.patches import LowRank, Patch
from deltas.sites import BackboneSpec


class VbLora(PerSite):
    """Low-rank factors made of shared vectors."""

    name = "vblora"
    optional = ("logits_A", "logits_B", "indices_A", "indices_B", "weights_A", "weights_B")
    shared = ("bank",)
    integers = frozenset({"indices_A", "indices_B"})

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"topk"}))
        return {"topk": whole(config.get("topk"), "topk", 1)}

    def check_shared(
        self, shared: Mapping[str, Shape], _sites: list[Outlined], config: Mapping[str, Any]
    ) -> None:
        if "bank" not in shared:
            raise InvalidDelta("missing tensor: bank", field="bank")
        expect("bank", shared["bank"], (0, 0))
        if config["topk"] > shared["bank"][0]:
            raise InvalidDelta(f"the bank has {shared['bank'][0]} vectors, fewer than topk", field="topk")

    def check_site(self, here: Outlined) -> None:
        length = here.shared["bank"][1]
        if here.site.in_features % length or here.site.out_features % length:
            raise InvalidDelta(
                f"vectors of {length} do not divide the sizes of {here.site.name}", field="bank"
            )
        rank = _tiles(here, "A", 0, here.site.in_features // length)[0]
        _tiles(here, "B", here.site.out_features // length, rank)

    def check_values(self, component: Component, _spec: BackboneSpec) -> None:
        vectors = len(component.tensors["bank"])
        for name, tensor in component.tensors.items():
            if name.rpartition("/")[2] in self.integers:
                check_indices(name, tensor, vectors)

    def rank(self, outline: Outline) -> int | None:
        ends = ("/logits_A", "/indices_A")
        return max((s[0] for name, s in outline.shapes.items() if name.endswith(ends)), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        down = _mixed(here, "A").flatten(1)  # [r, in/L, L]
        up = _mixed(here, "B").transpose(0, 1).flatten(1)  # from [out/L, r, L]
        yield LowRank(here.site.name, down.contiguous(), up.contiguous())


def _tiles(here: Outlined, factor: str, rows: int, columns: int) -> Shape:
    """The shape of a factor's tiles; refuses both forms at once and neither."""
    logits, indices, weights = (f"{kind}_{factor}" for kind in ("logits", "indices", "weights"))
    given = [name for name in (logits, indices, weights) if name in here.shapes]
    if given == [logits]:
        return here.expect(logits, rows, columns, here.shared["bank"][0])
    if given != [indices, weights]:
        name = f"{here.site.name}/{logits}"
        raise InvalidDelta(f"{name!r} must be there, or {indices} and {weights}", field=name)
    topk = here.config["topk"]
    shape = here.expect(indices, rows, columns, topk)
    if here.shapes[weights] != (*shape[:2], topk - 1):
        raise here.refuse(weights, f"expected {[*shape[:2], topk - 1]}")
    return shape


def _mixed(here: Loaded, factor: str) -> Tensor:
    if f"logits_{factor}" in here:
        best, indices = here[f"logits_{factor}"].topk(here.config["topk"], dim=-1)
        weights = best.softmax(-1)
    else:
        indices, most = here[f"indices_{factor}"], here[f"weights_{factor}"]
        weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], dim=-1)
    mixed: Tensor = (weights[..., None] * here.shared["bank"][indices]).sum(-2)
    return mixed
