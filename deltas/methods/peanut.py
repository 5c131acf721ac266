"""PEANuT: dW as a small neural network of the weight: ``dW = s B net(W^T A^T)^T``, row by row of W^T.

The network starts with ``h = f(W^T A^T)``, takes h through ``<site>/e0``, ``e1``, ... and then ``<site>/d0``,
``d1``, ..., each ``h <- f(h M^T)``, and adds to what every d gives what its partner e (the last e for d0) read.
Canonical tensors ``<site>/A`` ``[r, out]``, ``<site>/B`` ``[out, r]``, e and d ``[r, r]``; config ``{"scale": s,
"activation": f}``. (Zhong et al. 2024, "PEANuT".)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltas.errors import InvalidDelta
from deltas.methods.base import Outline, number, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import LowRank, Patch

MAX_DEPTH = 8
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Peanut(PerSite):
    """Low-rank changes computed from the weight."""

    name = "peanut"
    required = ("A", "B")
    optional = tuple(f"{part}{i}" for i in range(MAX_DEPTH) for part in "ed")

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"scale", "activation"}))
        if not isinstance(config.get("activation"), str) or config["activation"] not in _ACTIVATIONS:
            raise InvalidDelta(f"activation must be one of {', '.join(_ACTIVATIONS)}", field="activation")
        return {"scale": number(config.get("scale"), "scale"), "activation": config["activation"]}

    def check_site(self, here: Outlined) -> None:
        rank = here.expect("A", 0, here.site.out_features)[0]
        here.expect("B", here.site.out_features, rank)
        layers = [name for name in here.shapes if name not in self.required]
        for name in layers:
            here.expect(name, rank, rank)
        wanted = {f"{part}{i}" for i in range(len(layers) // 2) for part in "ed"}
        if set(layers) != wanted:
            name = f"{here.site.name}/{sorted(set(layers) ^ wanted)[0]}"
            raise InvalidDelta(f"{name!r}: every e has one d, and none is left out", field=name)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        activation = _ACTIVATIONS[here.config["activation"]]
        depth = (len(here.tensors) - len(self.required)) // 2
        h: Tensor = activation(here.weights.weight(here.site).T @ here["A"].T)  # [in, r]
        read: list[Tensor] = []
        for i in range(depth):
            read.append(h)
            h = activation(h @ here[f"e{i}"].T)
        for i in range(depth):
            h = activation(h @ here[f"d{i}"].T) + read[depth - 1 - i]
        yield LowRank(here.site.name, h.T.contiguous(), (here["B"].T * here.config["scale"]).contiguous())
