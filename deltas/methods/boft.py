"""BOFT: ``y = s * (W (x R)) + b`` with R a product of butterfly factors, each block-diagonal after a permutation.

Canonical tensors ``<site>/R`` ``[factors, blocks, m, m]``, of which the skew-symmetric part counts, and
``<site>/s`` ``[out]``. (Liu et al. 2024, "BOFT"; PEFT's own code makes one factor where its CUDA extension is
missing.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deltas.methods.oft import cayley
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import Gain, Patch, Rotation, Shift


class Boft(PerSite):
    """Rotations of the input by butterfly factors, and a gain of the output before the bias."""

    name = "boft"
    required = ("R", "s")

    def check_site(self, here: Outlined) -> None:
        here.expect("s", here.site.out_features)
        factors, blocks, size, _ = here.expect("R", 0, 0, 0, 0)
        here.expect("R", factors, blocks, size, size)
        if blocks * size != here.site.in_features:
            raise here.refuse("R", f"its blocks must cover the input's {here.site.in_features}")
        if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
            raise here.refuse(
                "R", f"{factors} factors need even blocks, {2 ** (factors - 1)} times some number"
            )

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        raw, site = here["R"], here.site
        skew = (raw - raw.transpose(2, 3)) / 2
        factors = [cayley(part) for part in skew]
        blocks = factors[0] if len(factors) == 1 else _butterfly(factors)
        yield Rotation(site.name, blocks.contiguous())
        yield Gain(site.name, here["s"], multiplies=False)
        bias = here.weights.bias(site)
        if bias is not None:
            yield Shift(site.name, ((1 - here["s"]) * bias).contiguous())


def _butterfly(factors: list[Tensor]) -> Tensor:
    """The product of the factors as one block ``[1, in, in]``."""
    count, size, _ = factors[0].shape
    product = torch.eye(count * size)
    for level, blocks in enumerate(factors):
        order = _order(count * size, size * 2**level, size // 2)
        diagonal = torch.zeros(count, size, count, size)
        diagonal[range(count), :, range(count)] = blocks
        product = diagonal.reshape(count * size, count * size)[order][:, order] @ product
    return product[None]


def _order(width: int, block: int, half: int) -> Tensor:
    """In every block, chunks of ``half`` in the order 0, 2, 4, ..., 1, 3, 5, ..."""
    chunks = torch.arange(width).reshape(width // block, block // half, half)
    return torch.cat([chunks[:, 0::2], chunks[:, 1::2]], dim=1).reshape(-1)
