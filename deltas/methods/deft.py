"""DEFT: ``dW = Q (s R - L^T W)``: a subspace of the weight's outputs is taken out, and something trained put in.

Canonical tensors ``<site>/P`` ``[out, r]`` and ``<site>/R`` ``[r, in]``, which may be absent (PaRa: nothing is put
in). Config ``{"scale": s, "orthogonal": bool}``: Q and L are an orthonormal basis of P's columns (QR), or P and its
positive part. (PEFT 0.21.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltas.methods.base import Outline, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, scale_at, scales, truth
from deltas.patches import LowRank, Patch


class Deft(PerSite):
    """Subspaces replaced."""

    name = "deft"
    required = ("P",)
    optional = ("R",)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "scales", "orthogonal"}))
        return scales(config) | {"orthogonal": truth(config.get("orthogonal", False), "orthogonal")}

    def check_site(self, here: Outlined) -> None:
        rank = here.expect("P", here.site.out_features, 0)[1]
        if rank > here.site.out_features:
            raise here.refuse("P", "more directions than outputs")
        if "R" in here.shapes:
            here.expect("R", rank, here.site.in_features)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[1] for name, shape in outline.shapes.items() if name.endswith("/P")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        outer = here["P"]
        inner = outer.relu()
        if here.config["orthogonal"]:
            outer = inner = torch.linalg.qr(outer).Q
        down = -(inner.T @ here.weights.weight(here.site))
        if "R" in here:
            down = down + here["R"] * scale_at(here)
        yield LowRank(here.site.name, down.contiguous(), outer.T.contiguous())
