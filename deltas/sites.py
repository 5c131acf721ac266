"""Sites: the canonical hook points of a backbone, one vocabulary for every architecture.

``layers.3.attn.q`` names the same thing in Llama, GPT-2 or BERT. ``backbones/`` has one small table per
architecture family that maps site names to module paths; everything above this file speaks of sites only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Literal


class SiteKind(StrEnum):
    """What a site is, hence which patches it takes."""

    LINEAR = "linear"  # y = W x + b
    NORM = "norm"  # a layer or RMS norm
    BLOCK = "block"  # the output of a sublayer, before the residual is added: bottlenecks
    EMBEDDING = "embedding"  # a table of rows
    KV = "kv"  # a layer's keys and values: KVPrefix


@dataclass(frozen=True, slots=True)
class Site:
    """One hook point. ``in_features``/``out_features`` are the widths a patch must have there.

    A fused linear (GPT-2's ``c_attn``) is a site, and each of its parts is one too: ``part`` sites have the same
    ``path`` and start at output column ``offset``. A block site tells where a bottleneck finds what it reads:
    ``residual`` is the module whose *input* will be added to the sublayer's output, ``inner`` the sublayer's first
    linear, ``norm`` the norm that follows the addition (post-norm backbones only, else empty).
    """

    name: str
    kind: SiteKind
    path: str  # of the torch module it hooks, as in the Hugging Face model
    in_features: int
    out_features: int
    bias: bool = False  # does the backbone itself have a bias here
    offset: int = 0
    part: bool = False
    residual: str = ""
    norm: str = ""
    inner: str = ""
    refused: str = ""  # why nothing can be changed here, where that is so
    heads_axis: int = (
        0  # of a norm of each head by itself: where the heads are in what it is given, from the last
    )
    scale: float = 1.0  # of an embedding that multiplies what it looks up: by how much

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[out, in]`` of a linear whatever the module stores, ``[n]`` of a norm, ``[rows, width]`` of an embedding."""
        if self.kind is SiteKind.NORM:
            return (self.out_features,)
        if self.kind is SiteKind.EMBEDDING:
            return (self.in_features, self.out_features)
        return (self.out_features, self.in_features)


@dataclass(frozen=True, slots=True)
class TaskHead:
    """What a backbone's configuration says of the head of the family's own classes for tasks: which tokens it reads,
    its activation, the epsilon of its norm."""

    pooling: Literal["first", "mean"]
    activation: str
    norm_eps: float


@dataclass(frozen=True)
class BackboneSpec:
    """What the library knows of a backbone without its weights: sizes and sites.

    ``revision`` identifies the weights; it is part of every cache key. ``base_prefix`` is how module paths begin in
    the model with a head (``model``, ``bert``; empty for T5); ``conv1d`` tells that linears store ``[in, out]``,
    ``tied`` that the head's weight is the token embedding, ``keys_first`` that torch lists an attention's modules as k,
    v, q. ``task_head`` is None where the family's head for tasks
    does not depend on the configuration.
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
    sites: Mapping[str, Site] = field(
        hash=False
    )  # no mapping has a hash; specs that differ here alone are still unequal
    kind: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"
    base_prefix: str = "model"
    conv1d: bool = False
    tied: bool = False
    keys_first: bool = False
    task_head: TaskHead | None = None

    @cached_property
    def by_path(self) -> Mapping[str, Site]:
        """Module path -> the linear, norm or embedding site that hooks it (the whole module, not its parts)."""
        hooked = (SiteKind.LINEAR, SiteKind.NORM, SiteKind.EMBEDDING)
        return {site.path: site for site in self.sites.values() if site.kind in hooked and not site.part}

    def site_at(self, path: str) -> Site | None:
        """The site of a module, whether or not ``path`` begins with the base model's name."""
        return self.by_path.get(path) or self.by_path.get(f"{self.base_prefix}.{path}")

    def parts_of(self, site: Site) -> list[Site]:
        """The parts of a fused linear, in the order of their columns; none for an ordinary one."""
        return [s for s in self.sites.values() if s.part and s.path == site.path]

    def in_module_order(self, sites: Iterable[Site]) -> list[Site]:
        """Sites in the order of torch's list of modules, which need not be the one in which a forward pass meets them."""
        place: dict[str, float] = {name: index for index, name in enumerate(self.sites)}
        if self.keys_first:
            place |= {name: index + 2.5 for name, index in place.items() if name.endswith(".q")}
        return sorted(sites, key=lambda site: place[site.name])

    def of_kind(self, *kinds: SiteKind) -> list[Site]:
        """The sites of these kinds, in the order in which a forward pass meets them."""
        return [site for site in self.sites.values() if site.kind in kinds]
