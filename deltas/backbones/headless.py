"""Checkpoints without the head that their table has: a bare ``BertModel``, as sentence encoders are published."""

from __future__ import annotations

from dataclasses import replace

from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import Source


def without_absent_head(spec: BackboneSpec, source: Source) -> BackboneSpec:
    """The spec without the sites of the language-model head, if ``source`` lacks any of that head's own weights.

    Such a head is random, and no delta may be a change of it.
    """
    head = [site for site in spec.sites.values() if site.name == "head" or site.name.startswith("head.")]
    own = [site for site in head if site.name != "head" and site.kind is not SiteKind.BLOCK]
    parameters = [f"{s.path}.{part}" for s in own for part in ("weight", "bias")[: 1 + s.bias]]
    if all(source(parameter) is not None for parameter in parameters):
        return spec
    return replace(
        spec, sites={name: site for name, site in spec.sites.items() if site not in head}, tied=False
    )
