"""Dense differences: ``W + D``, for selective-module and last-layer tuning.

Canonical tensors ``<site>/matrix``, shaped as the weight (``[out, in]`` of a linear, ``[n]`` of a norm, ``[rows, width]``
of an embedding), and optional ``<site>/beta`` ``[out]``, added to the bias; no config. Tuning of the last layer has the
site ``head`` or those of the last layer. Unlike ``override``, which is absolute, differences sum.
"""

from __future__ import annotations

from collections.abc import Iterable

from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import DenseDiff, Patch, Shift
from deltas.sites import SiteKind


class Dense(PerSite):
    """Differences of whole weights and biases."""

    name = "dense"
    kinds = (SiteKind.LINEAR, SiteKind.NORM, SiteKind.EMBEDDING)
    required = ("matrix",)
    optional = ("beta",)

    def check_site(self, here: Outlined) -> None:
        here.expect("matrix", *here.site.weight_shape)
        if "beta" in here.shapes:
            here.expect("beta", here.site.out_features)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        yield DenseDiff(here.site.name, here["matrix"])
        if "beta" in here:
            yield Shift(here.site.name, here["beta"])
