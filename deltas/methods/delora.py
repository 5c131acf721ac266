"""DeLoRA: ``y += B diag(lambda / (r |A_i| |B_i|)) A (norm * x)``, a low-rank change of bounded size.

Canonical tensors ``<site>/A`` ``[r, in]``, ``<site>/B`` ``[out, r]``, ``<site>/lambda`` ``[1]`` and ``<site>/norm``
``[in]``, the norms of the weight's columns when training began. (Bini et al. 2025, "DeLoRA".)
"""

from __future__ import annotations

from collections.abc import Iterable

from deltas.methods.base import Outline
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import LowRank, Patch

_LEAST_NORM = 1e-4  # PEFT's


class DeLora(PerSite):
    """Low-rank additions whose directions and size are trained apart."""

    name = "delora"
    required = ("A", "B", "lambda", "norm")

    def check_site(self, here: Outlined) -> None:
        rank = here.expect("A", 0, here.site.in_features)[0]
        here.expect("B", here.site.out_features, rank)
        here.expect("lambda", 1)
        here.expect("norm", here.site.in_features)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        down, up = here["A"], here["B"].T
        sizes = down.norm(dim=1).clamp(min=_LEAST_NORM) * up.norm(dim=1).clamp(min=_LEAST_NORM)
        scale = here["lambda"] / len(down) / sizes
        yield LowRank(here.site.name, (down * here["norm"]).contiguous(), (up * scale[:, None]).contiguous())
