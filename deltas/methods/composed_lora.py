"""LoRAs whose second factor is a product or a mean, as AdapterHub's ``adapters`` stores them.

``dense_vera``: ``y += s (V B U) (A x)`` with ``A`` ``[r, in]`` and ``B`` ``[out, r]`` shared by all sites,
``<site>/V`` ``[out, out]`` and ``<site>/U`` ``[r, r]``, which begin as VeRA's diagonals (Kopiczko et al. 2024) but
are trained whole; with ``<site>/magnitude`` ``[out]`` as DoRA, the norms being those of ``W + V B U A`` (DVoRA;
Nasery et al. 2024).

``mtl_lora``: ``y += s sum_u p_u B_u (v * A x)`` with ``p = softmax(w / sharpness)``, tensors ``<site>/A``
``[r, in]``, ``<site>/B`` ``[n, out, r]``, ``<site>/values`` v ``[r]``, ``<site>/weights`` w ``[n]`` (Yang et al.
2024, MTL-LoRA).

Config of both ``{"scale": s}``, of the latter also ``"sharpness"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, expect, number, only_keys
from deltas.methods.lora import adapterhub_dora
from deltas.methods.per_site import Loaded, Outlined, PerSite, Shape
from deltas.patches import LowRank, Patch


class DenseVera(PerSite):
    """Shared factors with matrices between and after them."""

    name = "dense_vera"
    required = ("V", "U")
    optional = ("magnitude",)
    shared = ("A", "B")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale"}))
        return {"scale": number(config.get("scale"), "scale")}

    def check_shared(
        self, shared: Mapping[str, Shape], _sites: list[Outlined], _config: Mapping[str, Any]
    ) -> None:
        for name in self.shared:
            if name not in shared:
                raise InvalidDelta(f"missing tensors: {name}", field=name)
            expect(name, shared[name], (0, 0))

    def check_site(self, here: Outlined) -> None:
        rank, into, out = here.shared["A"][0], here.site.in_features, here.site.out_features
        for name, shape in (("A", (rank, into)), ("B", (out, rank))):
            if here.shared[name] != shape:
                raise InvalidDelta(
                    f"{name} has shape {list(here.shared[name])}; {here.site.name} needs {list(shape)}",
                    field=name,
                )
        here.expect("V", out, out)
        here.expect("U", rank, rank)
        if "magnitude" in here.shapes:
            here.expect("magnitude", out)

    def rank(self, outline: Outline) -> int | None:
        shape = outline.shapes.get("A")
        return shape[0] if shape else None

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        down, second = here.shared["A"], here["V"] @ here.shared["B"] @ here["U"]
        scale = here.config["scale"]
        if "magnitude" not in here:
            return [LowRank(here.site.name, down, (second.T * scale).contiguous())]
        return adapterhub_dora(here.site, down, second, scale, here["magnitude"], here.weights)


class MtlLora(PerSite):
    """One first factor and the weighted mean of several second ones."""

    name = "mtl_lora"
    required = ("A", "B", "values", "weights")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "sharpness"}))
        sharpness = number(config.get("sharpness"), "sharpness")
        if sharpness <= 0:
            raise InvalidDelta("sharpness must be above 0", field="sharpness")
        return {"scale": number(config.get("scale"), "scale"), "sharpness": sharpness}

    def check_site(self, here: Outlined) -> None:
        rank, _ = here.expect("A", 0, here.site.in_features)
        count, _, _ = here.expect("B", 0, here.site.out_features, rank)
        here.expect("values", rank)
        here.expect("weights", count)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        shares = torch.softmax(here["weights"] / here.config["sharpness"], dim=0)
        second = torch.einsum("n,nor->or", shares, here["B"]) * here["values"] * here.config["scale"]
        yield LowRank(here.site.name, here["A"], second.T.contiguous())
