"""GraLoRA: every block of a weight changes by a low-rank matrix of its own; optionally the whole by one more.

With N x N blocks and k = r / N: canonical tensors ``<site>/A`` ``[N, in/N, r]`` and ``<site>/B`` ``[N, r, out/N]``;
block (j, n) of the change is ``B[j][nk : nk+k]^T A[n][:, jk : jk+k]^T``. The whole: ``<site>/general_A`` ``[q,
in]`` and ``<site>/general_B`` ``[out, q]``. Config ``{"scale": s}``. (Jung et al. 2025, "GraLoRA"; PEFT.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, number, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import DenseDiff, LowRank, Patch


class GraLora(PerSite):
    """Low-rank changes by block."""

    name = "gralora"
    required = ("A", "B")
    optional = ("general_A", "general_B")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale"}))
        return {"scale": number(config.get("scale"), "scale")}

    def check_site(self, here: Outlined) -> None:
        blocks, inner, rank = here.expect("A", 0, 0, 0)
        outer = here.expect("B", blocks, rank, 0)[2]
        site = here.site
        if (blocks * inner, blocks * outer) != (site.in_features, site.out_features):
            raise here.refuse("A", f"its blocks must make up {site.out_features} x {site.in_features}")
        if rank % blocks:
            raise here.refuse("A", f"the rank must be a multiple of its {blocks} blocks")
        general = [name for name in self.optional if name in here.shapes]
        if len(general) == 1:
            raise InvalidDelta(f"{site.name}/{general[0]} has no partner", field=f"{site.name}/{general[0]}")
        if general:
            width = here.expect("general_A", 0, site.in_features)[0]
            here.expect("general_B", site.out_features, width)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[2] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        site, scale = here.site, here.config["scale"]
        first, second = here["A"], here["B"]
        blocks, inner, rank = first.shape
        outer, part = second.shape[2], rank // blocks
        down = torch.zeros(blocks, rank, blocks, inner)  # of block n, its own columns
        up = torch.zeros(blocks, blocks, part, blocks, outer)  # of block n, towards block j
        towards = second.reshape(blocks, blocks, part, outer)  # [j, n, k, out/N]
        for n in range(blocks):
            down[n, :, n] = first[n].T
            for j in range(blocks):
                up[n, j, :, j] = towards[j, n]
        flat_down = down.reshape(-1, site.in_features)
        flat_up = up.reshape(-1, site.out_features) * scale
        if "general_A" in here:
            flat_down = torch.cat([flat_down, here["general_A"]])
            flat_up = torch.cat([flat_up, here["general_B"].T * scale])
        if flat_down.numel() + flat_up.numel() < site.in_features * site.out_features:
            yield LowRank(site.name, flat_down.contiguous(), flat_up.contiguous())
        else:
            yield DenseDiff(site.name, (flat_up.T @ flat_down).contiguous())
