"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2022) and Compacter (Karimi Mahabadi et al.
2021). What they add begins at zero: the second projection, or a factor of it, is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta
from deltas.methods.bottleneck import ACTIVATIONS
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tuned.base import Trained, normal, require
from deltas.tuned.options import Option, count, one_of, real
from deltas.tuned.targets import leaves
from deltas.weights import SiteWeights

_READS = ("output", "inner")
_CONFIG = ("activation", "reads", "scale")


class _Adapter(Trained):
    kinds = (SiteKind.BLOCK,)
    factor = 16.0

    def settle(self, options: dict[str, Any], spec: BackboneSpec, /) -> None:
        factor, pieces = options.pop("reduction_factor"), options.get("pieces", 1)
        if factor is not None and options["width"] is not None:
            raise InvalidDelta("width and reduction_factor say the same thing: give one", field="width")
        if options["width"] is None:
            options["width"] = max(1, round(spec.hidden / (factor or self.factor) / pieces)) * pieces

    def config(self, options: Mapping[str, Any], _sites: Sequence[Site], /) -> dict[str, Any]:
        return {name: options[name] for name in _CONFIG}

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        self.check_stored(component)
        require(options, component, *_CONFIG, "onto", "norm_around", "sites")
        return super().resume(component, options)


def _common(factor: float, activation: str, reads: str, scale: float) -> tuple[Option, ...]:
    return (
        Option("width", None, count(1, 65_536), "the width inside; null: by reduction_factor"),
        Option(
            "reduction_factor",
            None,
            real(0.125, 1e5),
            f"width = hidden size / reduction_factor; null: {factor:g}",
        ),
        Option("activation", activation, one_of(*ACTIVATIONS), "the non-linearity"),
        Option(
            "reads", reads, one_of(*_READS), "the block's output (in sequence) or what it read (in parallel)"
        ),
        Option("scale", scale, real(-1e3, 1e3), "what is added is multiplied by it"),
    )


class BottleneckTuning(_Adapter):
    """A two-layer perceptron at the ends of blocks. A preset has the blocks, width, activation and scale of AdapterHub's
    configuration of that name (in sequence it reads the block's output, whichever norm AdapterHub puts before it)."""

    learning_rate = 2e-3
    stored = "bottleneck"

    def __init__(
        self,
        name: str = "bottleneck",
        ends: tuple[str, ...] = ("attn.out", "cross.out", "mlp.out"),
        factor: float = 16.0,
        activation: str = "gelu",
        reads: str = "output",
        scale: float = 1.0,
        where: str = "the ends of all attention and feed-forward blocks",
    ) -> None:
        self.name = name
        self.where = where
        self.factor = factor
        self.known = _common(factor, activation, reads, scale)
        self._ends = ends

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return leaves(spec, *self._ends)

    def start(
        self,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in sites:
            hidden, width = site.out_features, options["width"]
            found |= {
                f"{site.name}/down": normal(rng, hidden**-0.5, width, hidden),
                f"{site.name}/down_bias": torch.zeros(width),
                f"{site.name}/up": torch.zeros(hidden, width),
                f"{site.name}/up_bias": torch.zeros(hidden),
            }
        return found


_MLP = "the ends of all feed-forward blocks"

PRESETS = (
    BottleneckTuning("seq_bn", ("mlp.out",), 16.0, "relu", where=_MLP),
    BottleneckTuning("double_seq_bn", factor=16.0, activation="silu"),
    BottleneckTuning("par_bn", ("mlp.out",), 2.0, "relu", "inner", 4.0, _MLP),
)


class CompacterTuning(_Adapter):
    """A bottleneck whose projections are sums of Kronecker products, of rank one; the small factors are shared."""

    name = "compacter"
    factor = 32.0
    learning_rate = 3e-3
    where = "the ends of all attention and feed-forward blocks"
    known = (
        *_common(32.0, "gelu", "output", 1.0),
        Option(
            "pieces", 4, count(1, 64), "how many Kronecker products are summed; divides hidden size and width"
        ),
    )

    def settle(self, options: dict[str, Any], spec: BackboneSpec, /) -> None:
        super().settle(options, spec)
        pieces = options["pieces"]
        for name, size in (("hidden size", spec.hidden), ("width", options["width"])):
            if size % pieces:
                raise InvalidDelta(f"pieces: {pieces} does not divide the {name}, {size}", field="pieces")

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return leaves(spec, "attn.out", "cross.out", "mlp.out")

    def start(
        self,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        _weights: SiteWeights,
        rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        pieces, width = options["pieces"], options["width"]
        # so that the entries of the matrix that the factors form have the deviation 1 / sqrt(inputs)
        found = {"rule": normal(rng, pieces**-0.5, pieces, pieces, pieces)}
        for site in sites:
            hidden = site.out_features
            down, up = hidden**-0.25, width**-0.25
            found |= {
                f"{site.name}/down_left": normal(rng, down, pieces, hidden // pieces, 1),
                f"{site.name}/down_right": normal(rng, down, pieces, 1, width // pieces),
                f"{site.name}/down_bias": torch.zeros(width),
                f"{site.name}/up_left": normal(rng, up, pieces, width // pieces, 1),
                f"{site.name}/up_right": torch.zeros(pieces, 1, hidden // pieces),
                f"{site.name}/up_bias": torch.zeros(hidden),
            }
        return found
