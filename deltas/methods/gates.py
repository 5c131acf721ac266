"""Gates: a number per row by which it takes a change, the mean over its tokens of a sigmoid (Mao et al. 2022, UniPELT).

A gate needs all tokens of a row at once, so it is served where attention looks both ways. On a causal backbone the
library's own answers would depend on how much of a text was computed in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltas.errors import UnsupportedDelta
from deltas.patches import Gate
from deltas.sites import BackboneSpec

PARAMETERS = ("gate", "gate_bias")
"""``<site>/gate`` ``[n, in]`` and ``<site>/gate_bias`` ``[n]``."""


def is_causal(site: str, spec: BackboneSpec) -> bool:
    """Are this site's tokens computed one after another?"""
    return spec.kind == "decoder" or (spec.kind == "encoder-decoder" and not site.startswith("encoder."))


def check_gate(site: str, spec: BackboneSpec, field: str | None = None) -> None:
    """Refuse a gate where tokens come one after another; ``field`` names the tensor or key."""
    if is_causal(site, spec):
        raise UnsupportedDelta(
            f"{site}: a gate averages over all tokens of a text, which a causal backbone never has at once",
            field=field or f"{site}/gate",
        )


def gate_of(tensors: Mapping[str, Tensor]) -> Gate | None:
    """The gate among a site's tensors (float32), if there is one."""
    return Gate(tensors["gate"], tensors["gate_bias"]) if "gate" in tensors else None
