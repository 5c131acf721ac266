"""MiSS: ``y += D^T (sum over the chunks of r of x)``: rows of a small matrix shared over the whole input.

Canonical tensor ``<site>/block``: ``[r, m]`` with m a divisor of ``out``, repeated over the outputs ("mini") or all
of them; or ``[out/r, r, r]``, the "bat" variant, where block (o, i) of the weight changes by ``(W_oi + 1) B_o``. A
last chunk that is shorter than r counts as padded with zeros. (Kang et al. 2025, "MiSS"; formerly Bone.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deltas.methods.base import Outline
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import DenseDiff, LowRank, Patch


class Miss(PerSite):
    """Changes that repeat one small block over a weight."""

    name = "miss"
    required = ("block",)

    def check_site(self, here: Outlined) -> None:
        shape = here.shapes["block"]
        if len(shape) == 3:
            size = shape[-1]
            here.expect("block", here.site.out_features // size if size else 0, size, size)
            if here.site.in_features % size or here.site.out_features % size:
                raise here.refuse("block", "its size must divide the input's and the output's")
            return
        rank, width = here.expect("block", 0, 0)
        if rank > here.site.in_features:
            raise here.refuse("block", f"more rows than the input's {here.site.in_features}")
        if here.site.out_features % width:
            raise here.refuse("block", f"its width must divide the output's {here.site.out_features}")

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for shape in outline.shapes.values() if len(shape) == 2), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        block, site = here["block"], here.site
        if block.dim() == 3:
            size = block.shape[-1]
            parts = here.weights.weight(site).reshape(len(block), size, -1, size)  # [o, row, i, column]
            change = torch.einsum("oric,ocd->orid", parts, block) + block[:, :, None]
            yield DenseDiff(site.name, change.reshape(site.out_features, site.in_features).contiguous())
            return
        rank = len(block)
        chunk = torch.arange(site.in_features) % rank
        down = torch.nn.functional.one_hot(chunk, rank).T.to(torch.float32)
        up = block.repeat(1, site.out_features // block.shape[1])
        yield LowRank(site.name, down.contiguous(), up.contiguous())
