"""What the makers of random deltas draw from: numbers, sizes, sites."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltas.sites import BackboneSpec, Site, SiteKind

Tensors = dict[str, Tensor]
Made = tuple[Tensors, dict[str, Any]]
"""Canonical tensors, and a config."""

Maker = Callable[["Draw"], Made]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Draw:
    """Repeatable randomness for one delta of one backbone. ``std`` sizes everything that is drawn about zero."""

    spec: BackboneSpec
    rng: random.Random
    generator: torch.Generator
    std: float = 0.3

    @staticmethod
    def of(spec: BackboneSpec, seed: int, std: float = 0.3) -> Draw:
        return Draw(spec, random.Random(seed), torch.Generator().manual_seed(seed), std)

    def normal(self, *shape: int, about: float = 0.0, std: float | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator) * (self.std if std is None else std) + about

    def gains(self, *shape: int) -> Tensor:
        """About one."""
        return self.normal(*shape, about=1.0, std=0.2)

    def places(self, size: int, count: int) -> Tensor:
        """``count`` different numbers below ``size``, in no order."""
        if size < 1 << 20:
            return torch.randperm(size, generator=self.generator)[:count]
        found = torch.randint(size, (2 * count,), generator=self.generator).unique()
        return found[torch.randperm(len(found), generator=self.generator)[:count]]

    def size(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def scale(self) -> float:
        return round(self.rng.uniform(0.5, 2.0), 2)

    def flip(self) -> bool:
        return self.rng.random() < 0.5

    def one_of(self, options: Sequence[Choice]) -> Choice:
        return self.rng.choice(options)

    def divisor(self, number: int, most: int) -> int:
        """A divisor of at least 2, and at most ``most``."""
        return self.rng.choice([d for d in range(2, most + 1) if number % d == 0])

    def some(self, sites: Sequence[Site], at_most: int = 1 << 30) -> list[Site]:
        """Some of them and at least one, in order."""
        count = self.rng.randint(1, min(len(sites), at_most))
        return [sites[i] for i in sorted(self.rng.sample(range(len(sites)), count))]

    def linears(self, *, head: bool = False) -> list[Site]:
        """Some linears of the layers, the whole of fused ones; by chance the head too."""
        found = [s for s in self.spec.of_kind(SiteKind.LINEAR) if "layers." in s.name and not s.part]
        chosen = self.some(found)
        return [*chosen, self.spec.sites["head"]] if head and self.flip() else chosen

    def norms(self) -> list[Site]:
        return self.some(self.spec.of_kind(SiteKind.NORM))

    def blocks(self) -> list[Site]:
        return self.some(self.spec.of_kind(SiteKind.BLOCK))

    def embeddings(self) -> list[Site]:
        """Some embeddings that a forward pass looks up row by row."""
        return self.some([s for s in self.spec.of_kind(SiteKind.EMBEDDING) if not s.refused])

    def looking_both_ways(self, sites: Sequence[Site]) -> list[Site]:
        """Those where a row's tokens are all there at once; all of them where there is no such site."""
        if self.spec.kind == "encoder-decoder":
            return [s for s in sites if s.name.startswith("encoder.")] or list(sites[:1])
        return list(sites)


def per_site(sites: Sequence[Site], tensors: Callable[[Site], Mapping[str, Tensor]]) -> Tensors:
    """``<site>/<parameter>`` for every site."""
    return {f"{site.name}/{name}": tensor for site in sites for name, tensor in tensors(site).items()}
