"""Sites: the canonical hook points of a backbone, one vocabulary for every architecture.

``layers.3.attn.q`` names the same thing in Llama, GPT-2 or BERT. ``backbones/`` has one small table per
architecture family that maps site names to module paths; everything above this file speaks of sites only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class SiteKind(StrEnum):
    """What a site is, hence which patches it takes."""

    LINEAR = "linear"  # y = W x + b: LowRank, Shift
    NORM = "norm"  # a layer or RMS norm: Shift
    BLOCK = "block"  # the output of a sublayer, before the residual is added: Bottleneck
    EMBEDDING = "embedding"  # the token embedding
    KV = "kv"  # a layer's keys and values: KVPrefix


@dataclass(frozen=True, slots=True)
class Site:
    """One hook point. ``in_features``/``out_features`` are the widths a patch must have there."""

    name: str
    kind: SiteKind
    path: str  # of the torch module it hooks, as in the Hugging Face model
    in_features: int
    out_features: int
    bias: bool = False  # does the backbone itself have a bias here


@dataclass(frozen=True)
class BackboneSpec:
    """What the library knows of a backbone without its weights: sizes and sites.

    ``revision`` identifies the weights; it is part of every cache key.
    """

    family: str
    revision: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    pre_norm: bool
    sites: Mapping[str, Site]

    @cached_property
    def by_path(self) -> Mapping[str, Site]:
        """Module path -> the linear, norm or embedding site that hooks it."""
        hooked = (SiteKind.LINEAR, SiteKind.NORM, SiteKind.EMBEDDING)
        return {site.path: site for site in self.sites.values() if site.kind in hooked}

    def of_kind(self, *kinds: SiteKind) -> list[Site]:
        """The sites of these kinds, in the order in which a forward pass meets them."""
        return [site for site in self.sites.values() if site.kind in kinds]
