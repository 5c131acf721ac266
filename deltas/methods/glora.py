"""GLoRA: ``y += (W * A + B) x + b * D + E + W C``: the weight and the bias each scaled, shifted and mixed.

Canonical tensors, all optional: a path P of A, B, C, D, E is ``<site>/P.down`` ``[r, n]`` and ``<site>/P.up`` ``[m,
r]``, whose product counts, or ``<site>/P`` as it is. A and B are ``[out, in]``, ``[out, 1]`` or ``[1]``; C is
``[in, 1]``; D and E ``[out]`` or ``[1]``. Without a bias of the backbone's, C, D and E change nothing. (Chavan et
al. 2023, "One-for-All"; PEFT.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.methods.base import Outline
from deltas.methods.per_site import Loaded, Outlined, PerSite, Shape
from deltas.patches import DenseDiff, Gain, LowRank, Patch, Shift

_PATHS = ("A", "B", "C", "D", "E")


class GLora(PerSite):
    """Scaled, shifted and mixed weights and biases."""

    name = "glora"
    optional = tuple(f"{path}{part}" for path in _PATHS for part in ("", ".down", ".up"))

    def check_site(self, here: Outlined) -> None:
        out, inner = here.site.out_features, here.site.in_features
        allowed: dict[str, tuple[Shape, ...]] = {
            "A": ((out, inner), (out, 1), (1,)),
            "B": ((out, inner), (out, 1), (1,)),
            "C": ((inner, 1),),
            "D": ((out,), (1,)),
            "E": ((out,), (1,)),
        }
        for path, shapes in allowed.items():
            parts = [part for part in ("", ".down", ".up") if path + part in here.shapes]
            if parts == [".down", ".up"]:
                rank, width = here.expect(f"{path}.down", 0, 0)
                height = here.expect(f"{path}.up", 0, rank)[0]
                if (height, width) != shapes[0]:
                    raise here.refuse(f"{path}.up", f"the product must be {list(shapes[0])}")
            elif parts == [""]:
                if here.shapes[path] not in shapes:
                    raise here.refuse(path, f"expected {' or '.join(str(list(s)) for s in shapes)}")
            elif parts:
                name = f"{here.site.name}/{path}{parts[0]}"
                raise InvalidDelta(f"{name!r}: a path is given whole, or as down and up together", field=name)

    def rank(self, outline: Outline) -> int | None:
        return max((s[0] for name, s in outline.shapes.items() if name.endswith(".down")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        site = here.site
        bias = here.weights.bias(site)
        shift = torch.zeros(site.out_features)
        scaled = _path(here, "A")
        if scaled is not None and scaled.shape[-1] == site.in_features and scaled.dim() == 2:
            yield DenseDiff(site.name, (here.weights.weight(site) * scaled).contiguous())
        elif scaled is not None:
            gain = scaled.reshape(-1).expand(site.out_features)
            yield Gain(site.name, (1 + gain).contiguous(), multiplies=False)
            if bias is not None:
                shift = shift - gain * bias
        yield from _added(here)
        if bias is not None:
            times, plus, mixed = (_path(here, path) for path in ("D", "E", "C"))
            shift = shift if times is None else shift + bias * times
            shift = shift if plus is None else shift + plus
            shift = shift if mixed is None else shift + (here.weights.weight(site) @ mixed).reshape(-1)
            yield Shift(site.name, shift.contiguous())


def _path(here: Loaded, path: str) -> Tensor | None:
    if f"{path}.up" in here:
        return here[f"{path}.up"] @ here[f"{path}.down"]
    if path not in here:
        return None
    return here[path]


def _added(here: Loaded) -> Iterable[Patch]:
    """B: low rank, or one number for each output, which takes the sum of x."""
    site = here.site
    if "B.up" in here:
        yield LowRank(site.name, here["B.down"], here["B.up"].T.contiguous())
    elif "B" in here and here["B"].shape == (site.out_features, site.in_features):
        yield DenseDiff(site.name, here["B"])
    elif "B" in here:
        up = here["B"].reshape(1, -1).expand(1, site.out_features)
        yield LowRank(site.name, torch.ones(1, site.in_features), up.contiguous())
