"""LoKr: ``y += s (w1 kron w2) x``, where either factor may be a product of two low-rank ones.

Canonical tensors ``<site>/w1`` ``[a, b]`` or ``<site>/w1_a`` ``[a, r]`` and ``<site>/w1_b`` ``[r, b]``, the same
for w2 ``[c, d]``, with ``ac = out`` and ``bd = in``; config ``{"scale": s}`` with ``"scales"``. (Yeh et al. 2024,
LyCORIS.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, scale_at, scales
from deltas.patches import Kronecker, Patch


class LoKr(PerSite):
    """Kronecker products."""

    name = "lokr"
    optional = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "scales"}))
        return scales(config)

    def check_site(self, here: Outlined) -> None:
        (a, b), (c, d) = _shape(here, "w1"), _shape(here, "w2")
        if (a * c, b * d) != (here.site.out_features, here.site.in_features):
            wanted = f"{here.site.out_features} x {here.site.in_features}"
            name = f"{here.site.name}/{'w1' if 'w1' in here.shapes else 'w1_a'}"
            raise InvalidDelta(
                f"{name!r} is {a} x {b} and its partner {c} x {d}, which do not make {wanted}", field=name
            )

    def rank(self, outline: Outline) -> int | None:
        sizes = (shape[1] for name, shape in outline.shapes.items() if name.endswith("_a"))
        return max(sizes, default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        left = _factor(here, "w1") * scale_at(here)
        yield Kronecker(here.site.name, left.contiguous(), _factor(here, "w2").contiguous())


def _shape(here: Outlined, factor: str) -> tuple[int, int]:
    """The shape of w1 or w2, whole or in two low-rank factors; refuses both forms at once and neither."""
    whole, parts = factor in here.shapes, [f"{factor}_a", f"{factor}_b"]
    given = [part for part in parts if part in here.shapes]
    name = f"{here.site.name}/{factor}"
    if whole and not given:
        rows, columns = here.expect(factor, 0, 0)
        return rows, columns
    if whole or len(given) != 2:
        raise InvalidDelta(f"{name!r} must be there whole, or as {' and '.join(parts)}", field=name)
    rows, rank = here.expect(parts[0], 0, 0)
    columns = here.expect(parts[1], rank, 0)[1]
    return rows, columns


def _factor(here: Loaded, factor: str) -> Tensor:
    if factor in here:
        return here[factor]
    return here[f"{factor}_a"] @ here[f"{factor}_b"]
