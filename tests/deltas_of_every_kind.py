"""A random delta of any method that is served, for any backbone: what tests use that must hold for all kinds.

A method without a maker is an error here, so a new one cannot be left out of those tests.
"""

from __future__ import annotations

from collections.abc import Mapping

from deltas.delta import Component, Delta
from deltas.methods import METHODS
from deltas.sites import BackboneSpec, SiteKind
from tests.kinds import blocks, low_rank, weights
from tests.kinds.draw import Draw, Maker

MAKERS: Mapping[str, Maker] = {**low_rank.MAKERS, **weights.MAKERS, **blocks.MAKERS}

NEEDS_ALL_TOKENS = frozenset({"gated_lora", "gated_ia3"})
"""Refused where tokens come one after another."""

FOR_T5 = frozenset({"opendelta_prefix"})
PREFIXES = frozenset({"prefix", "packed_prefix"})


def all_methods() -> list[str]:
    """The names of all methods. Raises LookupError where one has no maker, or a maker no method."""
    without, unknown = set(METHODS) - set(MAKERS), set(MAKERS) - set(METHODS)
    if without or unknown:
        raise LookupError(
            f"methods without a maker in tests/kinds: {sorted(without)}; makers without a method: {sorted(unknown)}"
        )
    return sorted(METHODS)


def served(spec: BackboneSpec) -> list[str]:
    """The methods that this backbone takes."""
    not_here: set[str] = set()
    if spec.kind == "decoder":
        not_here |= NEEDS_ALL_TOKENS
    if spec.family != "t5":
        not_here |= FOR_T5
    if any(site.refused for site in spec.of_kind(SiteKind.KV)):
        not_here |= PREFIXES
    return [name for name in all_methods() if name not in not_here]


def make(spec: BackboneSpec, method: str, seed: int, std: float = 0.3) -> Delta:
    """A random delta of one component, the same for the same arguments: at random sites, of random sizes, with options.

    ``std`` is the size of what starts at zero in training; every tensor is large enough to matter.
    """
    if method not in MAKERS:
        raise LookupError(f"no maker of {method!r} in tests/kinds")
    tensors, config = MAKERS[method](Draw.of(spec, seed, std))
    return Delta((Component(method, METHODS[method].normalise(config), tensors),))
