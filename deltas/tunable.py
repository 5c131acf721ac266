"""What a method needs to be trained: where it begins, what it does meanwhile, and what is kept of it.

The trained form may differ from the stored one (diff pruning has gates, masking has scores); both act through the same
patches, so a row that trains takes the way of a row that is served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.patches import Patch
from deltas.sites import BackboneSpec, Site
from deltas.weights import SiteWeights

Parameters = Mapping[str, Tensor]
"""Name -> float32 leaf tensor that requires a gradient."""


class Tunable(Protocol):
    """A method that jobs can train. Deterministic: the same options, sites, weights and generator give the same."""

    @property
    def name(self) -> str: ...

    @property
    def method(self) -> str:
        """The method of the stored form, in :data:`deltas.methods.METHODS`."""
        ...

    @property
    def learning_rate(self) -> float:
        """The peak learning rate (AdamW) that a job takes where it names none."""
        ...

    def options(self, given: Mapping[str, Any], spec: BackboneSpec, /) -> dict[str, Any]:
        """The method's options, validated and complete. Raises :class:`~deltas.errors.InvalidDelta`, whose ``field``
        is the option."""
        ...

    def sites(self, targets: Sequence[str] | None, spec: BackboneSpec, /) -> list[Site]:
        """Where it is put: the method's own choice for None, else the sites that ``targets`` name: canonical names,
        their last parts (``q``, ``attn.q``, ``mlp``), or the modules' own names (``q_proj``, ``query``).

        Raises :class:`~deltas.errors.InvalidDelta` with field ``targets`` for a name without a site.
        """
        ...

    def start(
        self, options: Mapping[str, Any], sites: Sequence[Site], weights: SiteWeights, rng: torch.Generator, /
    ) -> dict[str, Tensor]:
        """The parameters before the first step, float32, not requiring gradients yet."""
        ...

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        """The parameters that a stored component of this method came from, to train it further. Raises
        :class:`~deltas.errors.UnsupportedDelta` where the trained form cannot be told from the stored one."""
        ...

    def stored_sites(self, component: Component, spec: BackboneSpec, /) -> list[Site]:
        """The sites that a stored component of this method is put at, in forward order: those of a job that trains it
        further."""
        ...

    def patches(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        weights: SiteWeights,
        rng: torch.Generator | None,
        /,
    ) -> list[Patch]:
        """Patches that gradients flow through, float32. ``rng`` draws what training draws (gates, dropout); None is
        the deterministic form, which is what :meth:`component` stores."""
        ...

    def penalty(self, parameters: Parameters, options: Mapping[str, Any], /) -> Tensor | None:
        """What is added to the loss (a sparsity's price), a scalar, if anything."""
        ...

    def component(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        weights: SiteWeights,
        /,
    ) -> Component:
        """The stored form, detached and contiguous: ``METHODS[name].lower`` of it gives the deterministic patches."""
        ...
