"""OpenDelta's low-rank adapter: a bottleneck whose two matrices are outer products of two vectors each.

Canonical tensors ``<site>/down_left`` ``[hidden, 1]``, ``<site>/down_right`` ``[1, m]``, ``<site>/down_bias`` ``[m]``,
``<site>/up_left`` ``[m, 1]``, ``<site>/up_right`` ``[1, hidden]``, ``<site>/up_bias`` ``[hidden]``; everything else is as
for ``bottleneck``. Source: ``LowRankAdapter`` of OpenDelta 0.3.2, a baseline in Karimi Mahabadi et al., "Compacter" (2021).
"""

from __future__ import annotations

from torch import Tensor

from deltas.methods.base import Outline
from deltas.methods.bottleneck import BottleneckAdapter
from deltas.methods.per_site import Loaded, Outlined


class LowRankAdapter(BottleneckAdapter):
    """A bottleneck of two rank-one matrices; they are formed once, when it is lowered."""

    name = "low_rank_adapter"
    required = ("down_left", "down_right", "down_bias", "up_left", "up_right", "up_bias")

    def check_factors(self, here: Outlined) -> None:
        hidden = here.site.out_features
        here.expect("down_left", hidden, 1)
        _, width = here.expect("down_right", 1, 0)
        here.expect("down_bias", width)
        here.expect("up_left", width, 1)
        here.expect("up_right", 1, hidden)
        here.expect("up_bias", hidden)

    def factors(self, here: Loaded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        down, up = here["down_left"] * here["down_right"], here["up_left"] * here["up_right"]
        return down.T, here["down_bias"], up.T, here["up_bias"]

    def rank(self, outline: Outline) -> int | None:
        widths = (shape[1] for name, shape in outline.shapes.items() if name.endswith("/down_right"))
        return max(widths, default=None)
