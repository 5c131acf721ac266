"""Invertible adapters: two perceptrons that change the embeddings' halves in turn (NICE; Pfeiffer et al. 2020, MAD-X).

With the output cut into halves a and b: ``a += F(b)``, then ``b += G(a)``. Canonical tensors at an embedding site, or at
the norm that follows the embeddings: ``<site>/f_down`` ``[m, b]``, ``<site>/f_down_bias`` ``[m]``, ``<site>/f_up``
``[a, m]``, ``<site>/f_up_bias`` ``[a]``, and ``g_*`` from a to b; config ``{"activation"}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.base import only_keys
from deltas.methods.bottleneck import ACTIVATIONS, choice
from deltas.methods.per_site import Loaded, Outlined, PerSite
from deltas.patches import Affine, Coupling, Patch
from deltas.sites import SiteKind

_PARAMETERS = tuple(
    f"{half}_{layer}{bias}" for half in "fg" for layer in ("down", "up") for bias in ("", "_bias")
)


class Invertible(PerSite):
    """A coupling block on the embeddings."""

    name = "invertible"
    kinds = (SiteKind.EMBEDDING, SiteKind.NORM)
    required = _PARAMETERS

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"activation"}))
        return {"activation": choice(config, "activation", ACTIVATIONS)}

    def check_site(self, here: Outlined) -> None:
        if here.site.name not in ("embed", "embed.norm", "encoder.embed", "encoder.embed.norm"):
            name = f"{here.site.name}/f_down"
            raise InvalidDelta(f"{name!r}: an invertible adapter changes the embeddings only", field=name)
        if here.site.scale != 1.0:
            raise UnsupportedDelta(
                f"{here.site.name}: an invertible adapter behind embeddings that are scaled is not served",
                field=here.site.name,
            )
        first = here.site.out_features // 2
        second = here.site.out_features - first
        for half, into, out in (("f", second, first), ("g", first, second)):
            width, _ = here.expect(f"{half}_down", 0, into)
            here.expect(f"{half}_down_bias", width)
            here.expect(f"{half}_up", out, width)
            here.expect(f"{half}_up_bias", out)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        f_down, f_up, g_down, g_up = (
            Affine(here[name], here[f"{name}_bias"]) for name in ("f_down", "f_up", "g_down", "g_up")
        )
        yield Coupling(here.site.name, f_down, f_up, g_down, g_up, ACTIVATIONS[here.config["activation"]])
