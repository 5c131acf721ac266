"""What a resident delta costs: its own bytes, whatever lies beside it. On SmolLM2's shapes and on tiny ones; no weights.

A packed delta is compared with its own tensors as the backbone's dtype stores them (indices as int32). Methods that are
stored in fewer numbers than they change (a seed, a sum over frequencies) are compared with the patches they lower to.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, LlamaConfig, T5Config

from deltas import methods
from deltas.backbones import describe
from deltas.bank import PackedDelta
from deltas.delta import Component, Delta
from deltas.pack import pack
from deltas.sites import BackboneSpec, SiteKind
from deltas.tensors import tensors_of
from tests import deltas_of_every_kind as kinds

MOST = 1.25
DTYPES = [torch.float32, torch.bfloat16]

# Methods whose tensors, once packed, are of the size of what is stored. The others compute patches from less.
STORED_AS_SERVED = frozenset(
    {
        "adalora", "bitfit", "bottleneck", "delora", "dense", "diff_pruning", "fusion", "gated_ia3", "gated_lora",
        "head", "ia3", "invertible", "ln", "lora", "masking", "opendelta_prefix", "override", "prefix", "prompt",
        "shira", "tokens",
    }
)  # fmt: skip

WHOLE_MATRICES = frozenset({"dense", "fusion", "override"})
"""As large as the backbone's own on real shapes: nothing to learn from, and slow to draw."""


def smollm2() -> BackboneSpec:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return describe(config, "shapes")


def tiny(family: str) -> BackboneSpec:
    sizes = {"vocab_size": 61, "max_position_embeddings": 48}
    match family:
        case "llama":
            more = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            return describe(LlamaConfig(hidden_size=32, intermediate_size=48, **more, **sizes), "tiny")
        case "bert":
            more = {"num_hidden_layers": 2, "num_attention_heads": 4}
            return describe(BertConfig(hidden_size=32, intermediate_size=48, **more, **sizes), "tiny")
        case _:
            t5 = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
            return describe(t5, "tiny")


@cache
def backbone(name: str) -> tuple[BackboneSpec, dict[str, Tensor]]:
    """A backbone by name, and room for the weights that some methods ask for."""
    return (smollm2() if name == "smollm2" else tiny(name)), {}


def packed(name: str, delta: Delta, dtype: torch.dtype) -> PackedDelta:
    spec, weights = backbone(name)

    def source(key: str) -> Tensor | None:
        path, _, parameter = key.rpartition(".")
        site = spec.site_at(path)
        if site is None or (parameter == "bias" and not site.bias):
            return None
        if key not in weights:
            shape = site.weight_shape if parameter == "weight" else (site.out_features,)
            weights[key] = torch.full(shape, 0.5)
        return weights[key]

    return pack(methods.lower(delta, spec, source), spec, dtype)


def stored(tensors: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes of these tensors: floats in ``dtype``, integers in 32 bits."""
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else 4) for t in tensors)


def own(delta: Delta, dtype: torch.dtype) -> int:
    return stored((tensor for _, tensor in delta.named_tensors()), dtype)


def linears(spec: BackboneSpec, *leaves: str) -> list[str]:
    found = spec.of_kind(SiteKind.LINEAR)
    return [s.name for s in found if "layers." in s.name and (not leaves or s.name.endswith(leaves))]


def lora(spec: BackboneSpec, rank: int, sites: list[str]) -> Delta:
    tensors: dict[str, Tensor] = {}
    for name in sites:
        site = spec.sites[name]
        tensors[f"{name}/A"] = torch.ones(rank, site.in_features)
        tensors[f"{name}/B"] = torch.ones(site.out_features, rank)
    return Delta((Component("lora", {"scale": 1.0}, tensors),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["smollm2", "llama"])
def test_a_rank_4_beside_a_rank_64_pays_for_rank_4(name: str, dtype: torch.dtype) -> None:
    spec, _ = backbone(name)
    sites = linears(spec)
    ranks = [4, 64, 4, 8, 16, 4]
    deltas = [lora(spec, rank, sites) for rank in ranks]
    costs = [packed(name, delta, dtype).nbytes for delta in deltas]
    for cost, delta in zip(costs, deltas, strict=True):
        assert own(delta, dtype) <= cost <= MOST * own(delta, dtype)
    assert sum(costs) <= MOST * sum(own(delta, dtype) for delta in deltas)
    assert costs[1] / costs[0] == pytest.approx(16, rel=0.02)
    assert costs[0] == costs[2] == costs[5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["smollm2", "llama"])
def test_q_and_v_pay_for_q_and_v(name: str, dtype: torch.dtype) -> None:
    spec, _ = backbone(name)
    few, every = lora(spec, 8, linears(spec, ".q", ".v")), lora(spec, 8, linears(spec))
    small, large = packed(name, few, dtype), packed(name, every, dtype)
    assert small.nbytes <= MOST * own(few, dtype)
    assert small.nbytes / large.nbytes == pytest.approx(own(few, dtype) / own(every, dtype), rel=0.02)
    assert (
        len(small.patches) == spec.layers
    )  # q and v read one input: one group a layer, and no other is touched


def test_a_mix_of_ranks_kinds_and_targets_on_smollm2() -> None:
    spec, dtype = backbone("smollm2")[0], torch.bfloat16
    deltas = [
        lora(spec, 4, linears(spec)),
        lora(spec, 64, linears(spec, ".q", ".v")),
        lora(spec, 1, linears(spec, ".down")),
    ]
    names = sorted(STORED_AS_SERVED & set(kinds.served(spec)) - WHOLE_MATRICES)
    deltas += [kinds.make(spec, name, seed) for name in names for seed in (0, 1)]
    costs = [packed("smollm2", delta, dtype).nbytes for delta in deltas]
    for cost, delta in zip(costs, deltas, strict=True):
        assert cost <= MOST * own(delta, dtype), delta.methods
    assert sum(costs) <= MOST * sum(own(delta, dtype) for delta in deltas)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_every_kind_on_tiny_shapes(name: str, dtype: torch.dtype) -> None:
    """Pieces of 64 bytes weigh most here, and still less than a quarter of all."""
    spec, _ = backbone(name)
    bytes_own = bytes_packed = 0
    for method in kinds.served(spec):
        for seed in range(4):
            delta = kinds.make(spec, method, seed)
            cost = packed(name, delta, dtype)
            patches = sum(t.numel() * t.element_size() for t in _pieces(cost))
            assert cost.nbytes <= MOST * patches + 64 * (1 + len(_pieces(cost))), method
            if method in STORED_AS_SERVED:
                bytes_own, bytes_packed = bytes_own + own(delta, dtype), bytes_packed + cost.nbytes
    assert bytes_packed <= MOST * bytes_own


def test_only_known_methods_are_stored_as_served() -> None:
    assert set(methods.METHODS) >= STORED_AS_SERVED


def _pieces(delta: PackedDelta) -> list[Tensor]:
    """Everything that a delta has on the device, piece by piece."""
    parts = [delta.patches, delta.prefix, delta.prompt, delta.prefixes, delta.head]
    return [tensor for part in parts if part is not None for tensor in tensors_of(part)]
