"""WaveFT: ``y += s dW x`` where dW has trained values at places that a seed chooses, as they are or as Haar wavelets.

Canonical tensor ``<site>/spectrum`` ``[n]``; config ``{"scale": s, "seed": k}``, with ``"haar": true`` where the
values are the coefficients of one level of the two-dimensional Haar transform: approximation in the first quarter
of the matrix, then differences between rows, between columns, and both. An odd size counts as one more, and the matrix
is cut to size. (Bilican et al. 2025, "WaveFT"; PEFT. Of its wavelets only ``db1`` is served.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltas.methods.base import number, only_keys
from deltas.methods.fourierft import check_count, drawn_places
from deltas.methods.per_site import Loaded, Outlined, PerSite, truth, whole
from deltas.patches import Patch, SparseDiff


class WaveFt(PerSite):
    """Sparse changes, or changes that are sparse in Haar wavelets and so nearly as sparse."""

    name = "waveft"
    required = ("spectrum",)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "seed", "haar"}))
        result = {"scale": number(config.get("scale"), "scale"), "seed": whole(config.get("seed"), "seed")}
        return result | {"haar": True} if truth(config.get("haar", False), "haar") else result

    def check_site(self, here: Outlined) -> None:
        check_count(here, "spectrum")

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        values = here["spectrum"] * here.config["scale"]
        rows, columns = drawn_places(here, len(values))
        site = here.site
        if here.config.get("haar"):
            # a coefficient at (i, j) of its quarter changes the four entries (2i, 2j) .. (2i+1, 2j+1), by half each
            tall, wide = (site.out_features + 1) // 2, (site.in_features + 1) // 2
            below, right = rows >= tall, columns >= wide
            rows, columns = rows - tall * below, columns - wide * right
            parts = []
            for i in (0, 1):
                for j in (0, 1):
                    # a difference is the first entry less the second; the quarter on the right is between rows
                    sign = 1.0 - 2.0 * ((right & (i == 1)) ^ (below & (j == 1)))
                    parts.append((2 * rows + i, 2 * columns + j, values * sign / 2))
            rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
            inside = (rows < site.out_features) & (columns < site.in_features)
            rows, columns, values = rows[inside], columns[inside], values[inside]
        yield SparseDiff(site.name, rows.contiguous(), columns.contiguous(), values.contiguous())
