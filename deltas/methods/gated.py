"""LoRA and IA3 with a gate, as AdapterHub's UniPELT has them: it takes the place of the scale (Mao et al. 2022).

``gated_lora``: ``y += g(x) B (A x)``, tensors ``<site>/A`` ``[r, in]``, ``<site>/B`` ``[out, r]``. ``gated_ia3``:
``y <- g(x) gain * y``, tensor ``<site>/gain`` ``[out]``. Both have ``<site>/gate`` ``[1, in]`` and
``<site>/gate_bias`` ``[1]``; no config. See :mod:`deltas.methods.gates`.
"""

from __future__ import annotations

from collections.abc import Iterable

from deltas.methods import gates
from deltas.methods.base import Outline
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import Gate, GatedGain, GatedLowRank, Patch
from deltas.sites import BackboneSpec


class _Gated(PerSite):
    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        super().check(outline, spec)
        for name in outline.shapes:
            gates.check_gate(name.rpartition("/")[0], spec)

    def check_site(self, here: Outlined) -> None:
        here.expect("gate", 1, here.site.in_features)
        here.expect("gate_bias", 1)


class GatedLora(_Gated):
    """Low-rank additions by a gate."""

    name = "gated_lora"
    required = ("A", "B", *gates.PARAMETERS)

    def check_site(self, here: Outlined) -> None:
        super().check_site(here)
        rank, _ = here.expect("A", 0, here.site.in_features)
        here.expect("B", here.site.out_features, rank)

    def rank(self, outline: Outline) -> int | None:
        return max((shape[0] for name, shape in outline.shapes.items() if name.endswith("/A")), default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        gate = Gate(here["gate"], here["gate_bias"])
        yield GatedLowRank(here.site.name, here["A"], here["B"].T.contiguous(), gate)


class GatedIA3(_Gated):
    """Output gains by a gate."""

    name = "gated_ia3"
    required = ("gain", *gates.PARAMETERS)

    def check_site(self, here: Outlined) -> None:
        super().check_site(here)
        here.expect("gain", here.site.out_features)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        yield GatedGain(here.site.name, here["gain"], Gate(here["gate"], here["gate_bias"]))
