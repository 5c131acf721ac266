"""C3A: ``y += dW x`` where every block of dW is circulant: ``dW[m b + i, n b + j] = kernel[m, n, (j - i) mod b] /
in``.

Canonical tensor ``<site>/kernel`` ``[out/b, in/b, b]``. (Chen et al. 2025, "Circular Convolution Adaptation".)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import DenseDiff, Patch


class C3a(PerSite):
    """Block-circulant changes."""

    name = "c3a"
    required = ("kernel",)

    def check_site(self, here: Outlined) -> None:
        rows, columns, size = here.expect("kernel", 0, 0, 0)
        if (rows * size, columns * size) != (here.site.out_features, here.site.in_features):
            wanted = f"{here.site.out_features} x {here.site.in_features}"
            raise here.refuse("kernel", f"its blocks must make up the weight's {wanted}")

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        kernel, site = here["kernel"], here.site
        size = kernel.shape[2]
        places = torch.arange(size)
        turned = kernel[:, :, (places[None] - places[:, None]) % size]  # [m, n, i, j]
        matrix = turned.permute(0, 2, 1, 3).reshape(site.out_features, site.in_features) / site.in_features
        yield DenseDiff(site.name, matrix.contiguous())
