"""RoAd: pairs of outputs, bias included, are rotated and scaled: ``y_j <- a_j cos(t_j) y_j -+ a_j sin(t_j)
y_partner``.

Canonical tensors ``<site>/theta`` and ``<site>/alpha``; config ``{"variant": 1 | 2 | 4, "group": g}``. In every
group of g outputs, j of the first half and j + g/2 are partners. Variant 1 has ``[out/2]`` values, one for each
pair; 2 has ``[out]``, one for each output; 4 has ``[2 out]``, by group g for the cosines, then g for the sines.
(Liao and Monz 2024, "3-in-1".)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.methods.base import only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, whole
from deltas.patches import Mix, Patch

_VARIANTS = (1, 2, 4)


class Road(PerSite):
    """Rotations of pairs of outputs."""

    name = "road"
    required = ("theta", "alpha")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"variant", "group"}))
        variant, group = whole(config.get("variant"), "variant"), whole(config.get("group"), "group", 2)
        if variant not in _VARIANTS:
            raise InvalidDelta(f"variant must be one of {_VARIANTS}", field="variant")
        if group % 2:
            raise InvalidDelta("group must be even", field="group")
        return {"variant": variant, "group": group}

    def check_site(self, here: Outlined) -> None:
        out, group = here.site.out_features, here.config["group"]
        if out % group:
            raise here.refuse("theta", f"groups of {group} do not divide the output's {out}")
        size = out * here.config["variant"] // 2
        here.expect("theta", size)
        here.expect("alpha", size)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        group, variant, out = here.config["group"], here.config["variant"], here.site.out_features
        theta, alpha = here["theta"], here["alpha"]
        if variant == 4:
            (cosines, sines), (first, second) = _halves(theta, group), _halves(alpha, group)
        else:
            cosines = sines = _to_outputs(theta, group, variant)
            first = second = _to_outputs(alpha, group, variant)
        half = group // 2
        sign = torch.where(torch.arange(out) % group < half, -1.0, 1.0)
        partner = torch.arange(out).reshape(-1, 2, half).flip(1).reshape(-1)
        own, other = first * cosines.cos(), second * sines.sin() * sign
        yield Mix(here.site.name, own.contiguous(), other.contiguous(), partner)


def _to_outputs(values: Tensor, group: int, variant: int) -> Tensor:
    """Variant 1 has the values of a group's first half only, which its second half repeats."""
    if variant == 2:
        return values
    return values.reshape(-1, group // 2).repeat_interleave(2, dim=0).reshape(-1)


def _halves(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    parts = values.reshape(-1, 2, group)
    return parts[:, 0].reshape(-1), parts[:, 1].reshape(-1)
