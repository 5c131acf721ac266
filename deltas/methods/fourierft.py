"""FourierFT: ``y += s real(ifft2(F)) x`` where F has trained values at places that a seed chooses.

Canonical tensor ``<site>/spectrum`` ``[n]``; config ``{"scale": s, "seed": k}``: the places are the first n of a
permutation of all ``out * in``. (Gao et al. 2024, "FourierFT"; PEFT.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.methods.base import number, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, whole
from deltas.patches import DenseDiff, Patch


class FourierFt(PerSite):
    """Dense changes that are sparse in frequency."""

    name = "fourierft"
    required = ("spectrum",)

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "seed"}))
        return {"scale": number(config.get("scale"), "scale"), "seed": whole(config.get("seed"), "seed")}

    def check_site(self, here: Outlined) -> None:
        check_count(here, "spectrum")

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        site, spectrum = here.site, here["spectrum"]
        rows, columns = drawn_places(here, len(spectrum))
        frequencies = torch.zeros(site.out_features, site.in_features)
        frequencies[rows, columns] = spectrum
        matrix = torch.fft.ifft2(frequencies).real * here.config["scale"]
        yield DenseDiff(site.name, matrix.contiguous())


def check_count(here: Outlined, parameter: str) -> None:
    """Refuse more values than the site's weight has."""
    count = here.expect(parameter, 0)[0]
    most = here.site.in_features * here.site.out_features
    if count > most:
        raise here.refuse(parameter, f"more values than the weight's {most}")


def drawn_places(here: Loaded, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 ``[count]``, of the first places of a seeded permutation of the weight's entries."""
    generator = torch.Generator().manual_seed(here.config["seed"])
    total = here.site.in_features * here.site.out_features
    places = torch.randperm(total, generator=generator)[:count]
    return places // here.site.in_features, places % here.site.in_features
