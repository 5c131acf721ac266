"""AdaLoRA: ``y += s B ((A * E) x)``, a low-rank change as a singular value decomposition with trained singular values.

Canonical tensors ``<site>/A`` ``[r, in]``, ``<site>/B`` ``[out, r]``, ``<site>/E`` ``[r, 1]``; config ``{"scale":
s}`` with ``"scales"`` for the sites whose scale differs. Training may leave a site rank 0. (Zhang et al. 2023,
"AdaLoRA".)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltas.methods.base import Outline, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, scale_at, scales
from deltas.patches import LowRank, Patch


class AdaLora(PerSite):
    """Low-rank additions of a rank that training chose by site."""

    name = "adalora"
    required = ("A", "B", "E")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "scales"}))
        return scales(config)

    def check_site(self, here: Outlined) -> None:
        rank = here.shapes["A"][0] if here.shapes["A"] else 0
        wanted = {"A": (rank, here.site.in_features), "B": (here.site.out_features, rank), "E": (rank, 1)}
        for parameter, shape in wanted.items():
            if here.shapes[parameter] != shape:
                raise here.refuse(parameter, f"expected {list(shape)}")

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        if here["A"].shape[0]:
            up = here["B"].T * scale_at(here)
            yield LowRank(here.site.name, (here["A"] * here["E"]).contiguous(), up.contiguous())
