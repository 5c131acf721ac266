"""What a checkpoint's tensors say beyond its configuration: whether it has the head of its table, and one of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import Source


def as_stored(spec: BackboneSpec, source: Source) -> BackboneSpec:
    """The spec of a checkpoint whose tensors are ``source``."""
    if spec.kind == "encoder":
        return without_absent_head(spec, source)
    if spec.family == "t5" and spec.tied:
        # transformers calls every T5 tied, and unties those of which it finds two different tensors
        head, embedding = source("lm_head.weight"), source("shared.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            return replace(spec, tied=False)
    return spec


def without_absent_head(spec: BackboneSpec, source: Source) -> BackboneSpec:
    """The spec without the sites of the language-model head, if ``source`` lacks any of that head's own weights.

    A bare ``BertModel``, as sentence encoders are published, is such a checkpoint.

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
