"""AdapterFusion: attention over the outputs of several bottlenecks, token by token (Pfeiffer et al. 2021).

Canonical tensors at block sites: ``<site>/<j>.down`` and the other tensors of bottleneck j (with ``scaling``,
``norm_before`` and ``norm_before_bias`` where it has them), ``<site>/query``, ``<site>/key``, ``<site>/value``
``[hidden, hidden]`` and ``query_bias``, ``key_bias`` ``[hidden]``; a matrix that is missing is the identity. Config:
``"parts"``, ``{"activation", "scale"}`` of each bottleneck; ``"reads"`` and ``"onto"`` as in ``bottleneck``, for all of
them; ``"query_reads"``; ``"around": true`` where keys and values are made of the sum. See
:class:`~deltas.patches.Fusion`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, number, only_keys
from deltas.methods.bottleneck import ACTIVATIONS, READS, BottleneckAdapter, choice
from deltas.methods.per_site import Loaded, Outlined, PerSite, truth
from deltas.patches import Affine, Bottleneck, Fusion, Patch
from deltas.sites import SiteKind

MAX_PARTS = 16
_FACTORS = ("down", "down_bias", "up", "up_bias")
_OPTIONS = ("scaling", "norm_before", "norm_before_bias")
_BOTTLENECK = BottleneckAdapter()


class AdapterFusion(PerSite):
    """Bottlenecks mixed by attention."""

    name = "fusion"
    kinds = (SiteKind.BLOCK,)
    optional = (
        "query",
        "query_bias",
        "key",
        "key_bias",
        "value",
        *(f"{j}.{name}" for j in range(MAX_PARTS) for name in (*_FACTORS, *_OPTIONS)),
    )

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"parts", "reads", "onto", "query_reads", "around"}))
        parts = config.get("parts")
        if not isinstance(parts, list) or not 1 <= len(parts) <= MAX_PARTS:
            raise InvalidDelta(f"parts must be a list of 1 to {MAX_PARTS}", field="parts")
        found: dict[str, Any] = {"parts": [_part(part) for part in parts]}
        for key in ("reads", "onto", "query_reads"):
            found[key] = choice(config, key, READS)
        if truth(config.get("around", False), "around"):
            found["around"] = True
        return found

    def check_site(self, here: Outlined) -> None:
        hidden = here.site.out_features
        for name in ("query", "key", "value"):
            if name in here.shapes:
                here.expect(name, hidden, hidden)
            if name != "value" and (name in here.shapes) != (f"{name}_bias" in here.shapes):
                field = f"{here.site.name}/{name}"
                raise InvalidDelta(f"{field!r} needs its bias, and the bias needs it", field=field)
            if f"{name}_bias" in here.shapes:
                here.expect(f"{name}_bias", hidden)
        count = len(here.config["parts"])
        for j in range(count):
            for name in _FACTORS:
                if f"{j}.{name}" not in here.shapes:
                    field = f"{here.site.name}/{j}.{name}"
                    raise InvalidDelta(f"missing tensors: {field}", field=field)
            width, _ = here.expect(f"{j}.down", 0, hidden)
            here.expect(f"{j}.down_bias", width)
            here.expect(f"{j}.up", hidden, width)
            here.expect(f"{j}.up_bias", hidden)
            for name in _OPTIONS:
                if f"{j}.{name}" in here.shapes:
                    one = name == "scaling" and here.shapes[f"{j}.{name}"] == (1,)
                    here.expect(f"{j}.{name}", 1 if one else hidden)
            if (f"{j}.norm_before" in here.shapes) != (f"{j}.norm_before_bias" in here.shapes):
                field = f"{here.site.name}/{j}.norm_before"
                raise InvalidDelta(f"{field!r} needs its bias, and the bias needs it", field=field)
        beyond = [name for name in here.shapes if "." in name and int(name.partition(".")[0]) >= count]
        if beyond:
            field = f"{here.site.name}/{beyond[0]}"
            raise InvalidDelta(f"{field!r}: there are {count} parts", field=field)

    def rank(self, outline: Outline) -> int | None:
        widths: dict[str, int] = {}
        for name, shape in outline.shapes.items():
            if name.endswith(".down") and shape:
                site = name.rpartition("/")[0]
                widths[site] = widths.get(site, 0) + shape[0]
        return max(widths.values(), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        config = here.config
        yield Fusion(
            here.site.name,
            tuple(_lowered(here, j) for j in range(len(config["parts"]))),
            query=_affine(here, "query"),
            key=_affine(here, "key"),
            value=_affine(here, "value"),
            query_reads=READS[config["query_reads"]],
            onto=READS[config["onto"]],
            around=config.get("around", False),
        )


def _part(part: object) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise InvalidDelta("a part is an object", field="parts")
    only_keys(part, frozenset({"activation", "scale"}))
    return {
        "activation": choice(part, "activation", ACTIVATIONS),
        "scale": number(part.get("scale"), "scale"),
    }


def _affine(here: Loaded, name: str) -> Affine | None:
    return Affine(here[name], here.tensors.get(f"{name}_bias")) if name in here else None


def _lowered(here: Loaded, j: int) -> Bottleneck:
    """Bottleneck j as its own method lowers it."""
    start = f"{j}."
    tensors = {name.removeprefix(start): t for name, t in here.tensors.items() if name.startswith(start)}
    config = {**here.config["parts"][j], "reads": here.config["reads"]}
    (patch,) = _BOTTLENECK.lower_site(Loaded(here.site, tensors, {}, config, here.weights))
    if not isinstance(patch, Bottleneck):
        raise TypeError("a bottleneck lowers to one patch")
    return patch
