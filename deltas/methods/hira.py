"""HiRA: ``y += (W * (B A)) x``, a change of high rank as the weight times a low-rank matrix, element by element.

Canonical tensors ``<site>/A`` ``[r, in]`` and ``<site>/B`` ``[out, r]``; at an embedding the weight's rows change so.
(Huang et al. 2025, "HiRA".)
"""

from __future__ import annotations

from collections.abc import Iterable

from deltas.methods.base import Outline
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import DenseDiff, Override, Patch
from deltas.sites import SiteKind


class Hira(PerSite):
    """Elementwise multiples of the backbone's weight."""

    name = "hira"
    kinds = (SiteKind.LINEAR, SiteKind.EMBEDDING)
    required = ("A", "B")

    def check_site(self, here: Outlined) -> None:
        rank = here.expect("A", 0, here.site.in_features)[0]
        here.expect("B", here.site.out_features, rank)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        weight = here.weights.weight(here.site)
        factor = here["B"] @ here["A"]
        if here.site.kind is SiteKind.EMBEDDING:
            # PEFT adds this change behind the embedding's own factor, where that has one
            change = factor.T / here.site.scale
            yield Override(here.site.name, (weight * (1 + change)).contiguous(), None)
        else:
            yield DenseDiff(here.site.name, (weight * factor).contiguous())
