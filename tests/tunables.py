"""What the tests of trained methods share: tiny backbones, and a start of each method there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM

from deltas.backbones import describe
from deltas.patches import Patch
from deltas.sites import Site
from deltas.tensors import tensors_of
from deltas.tunable import Tunable
from deltas.tuned import tunable
from deltas.weights import FrozenTensors, SiteWeights
from tests.oracle.padded import BACKBONES

FAMILIES = ("bert", "llama", "gpt2", "gpt_neox", "t5", "bart", "modernbert")

GIVEN: Mapping[str, Mapping[str, Any]] = {
    "head": {"labels": ["no", "yes"]},
    "compacter": {"pieces": 2},
    "prompt": {"length": 4},
    "prefix": {"length": 4},
    "diff_pruning": {"density": 0.1},
    "intrinsic": {"dimensions": 7},
}
"""Options where the defaults do not fit a tiny backbone, or where there are none."""


@dataclass(frozen=True, eq=False)
class Started:
    """A method's parameters before the first step, and what they belong to."""

    method: Tunable
    options: dict[str, Any]
    sites: list[Site]
    weights: SiteWeights
    parameters: dict[str, Tensor]

    def patches(self, rng: torch.Generator | None = None) -> list[Patch]:
        """As the method says."""
        return self.method.patches(self.parameters, self.options, self.sites, self.weights, rng)


@cache
def weights_of(family: str) -> SiteWeights:
    """The tiny backbone of that family."""
    if family == "gpt_neox":  # the one with queries, keys and values in one linear that has no parts
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61, "pad_token_id": 0}
        config = GPTNeoXConfig(hidden_size=16, intermediate_size=24, max_position_embeddings=64, **sizes)
        torch.manual_seed(0)
        return SiteWeights(describe(config, "tiny"), GPTNeoXForCausalLM(config).state_dict().get)
    folder = BACKBONES / family
    return SiteWeights(describe(AutoConfig.from_pretrained(folder), "tiny"), FrozenTensors(folder))


def begin(
    name: str,
    family: str,
    given: Mapping[str, Any] | None = None,
    *,
    moved: float = 0.0,
    targets: list[str] | None = None,
) -> Started:
    """The method's start, every parameter ``moved`` by random numbers of about that size, requiring gradients."""
    method, weights = tunable(name), weights_of(family)
    options = method.options({**GIVEN.get(name, {}), **(given or {})}, weights.spec)
    if targets is None and name == "selective_module":
        targets = ["norms", "mlp.down"]
    sites = method.sites(targets, weights.spec)
    start = method.start(options, sites, weights, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(2)
    parameters = {
        key: (tensor + moved * torch.randn(tensor.shape, generator=rng)).requires_grad_()
        for key, tensor in start.items()
    }
    return Started(method, options, sites, weights, parameters)


def same(ours: list[Patch], others: list[Patch]) -> bool:
    """Whether two lists of patches are alike, bit by bit."""
    if [(type(a), getattr(a, "site", "")) for a in ours] != [
        (type(b), getattr(b, "site", "")) for b in others
    ]:
        return False
    return all(torch.equal(a, b) for a, b in zip(tensors_of(ours), tensors_of(others), strict=True))
