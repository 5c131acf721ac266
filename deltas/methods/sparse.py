"""What the methods share that change single entries of the backbone's weights, each given by its place.

``indices`` are int64 ``[dimensions, n]``, as of a ``torch.sparse_coo_tensor`` over the weight: row and column of a linear
``[out, in]`` (whatever the module stores) or of an embedding ``[rows, width]``, the place in a norm ``[n]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.base import check_indices, expect
from deltas.patches import DenseDiff, Shift, SparseDiff
from deltas.sites import BackboneSpec, Site, SiteKind

INTEGERS = frozenset({"indices", "bias_indices"})
KINDS = (SiteKind.LINEAR, SiteKind.NORM, SiteKind.EMBEDDING)


def check_entries(
    site: Site, shapes: Mapping[str, tuple[int, ...]], indices: str, values: str | None = None
) -> None:
    """Refuse ``indices`` and ``values`` that do not fit the site's weight, or its bias if they are ``bias_indices``."""
    name, extents = f"{site.name}/{indices}", _extents(site, indices)
    if not extents:
        raise InvalidDelta(f"{name!r}: an embedding has no bias", field=name)
    expect(name, shapes[indices], (len(extents), 0))
    count, size = shapes[indices][1], torch.Size(extents).numel()
    if count > size:
        raise InvalidDelta(f"{name!r} names {count} entries of {size}", field=name)
    if values is not None:
        expect(f"{site.name}/{values}", shapes[values], (count,))


def check_places(component: Component, spec: BackboneSpec) -> None:
    """Refuse places outside the weight or the bias that they are in."""
    for name, tensor in component.tensors.items():
        site, _, parameter = name.rpartition("/")
        if parameter in INTEGERS:
            for line, extent in zip(tensor, _extents(spec.sites[site], parameter), strict=True):
                check_indices(name, line, extent)


def weight_change(site: Site, indices: Tensor, values: Tensor) -> SparseDiff | DenseDiff:
    """``values`` ``[n]`` added to the weight at these places; repeated places add."""
    if site.kind is SiteKind.NORM:
        return DenseDiff(site.name, _spread(site, indices, values))
    return SparseDiff(site.name, indices[0].contiguous(), indices[1].contiguous(), values.contiguous())


def bias_change(site: Site, indices: Tensor, values: Tensor) -> Shift:
    """``values`` ``[n]`` added to the bias at these places, also where the backbone has none."""
    return Shift(site.name, _spread(site, indices, values))


def _spread(site: Site, indices: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(site.out_features).index_add_(0, indices[0], values)


def _extents(site: Site, parameter: str) -> tuple[int, ...]:
    if parameter == "indices":
        return site.weight_shape
    return () if site.kind is SiteKind.EMBEDDING else (site.out_features,)
