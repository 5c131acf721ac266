"""The table of Llama's sites against the real model's modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deltas.backbones import describe
from deltas.sites import SiteKind


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_dim": 10},
        {"num_key_value_heads": 2, "attention_bias": True},
        {"num_key_value_heads": 1, "mlp_bias": True, "tie_word_embeddings": True},
    ],
)
def test_every_site_is_in_the_model(options: dict[str, object]) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=128,
        **options,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    spec = describe(config, "r1")
    assert (spec.family, spec.revision, spec.hidden, spec.layers) == ("llama", "r1", 32, 2)
    assert (spec.vocab, spec.max_positions, spec.heads) == (64, 128, 4)
    for site in spec.sites.values():
        module = model.get_submodule(site.path)
        if site.kind == SiteKind.LINEAR:
            assert isinstance(module, nn.Linear)
            assert (module.in_features, module.out_features) == (site.in_features, site.out_features)
            assert (module.bias is not None) == site.bias
        elif site.kind == SiteKind.NORM:
            assert tuple(module.weight.shape) == (site.out_features,)
        elif site.kind == SiteKind.EMBEDDING:
            assert tuple(module.weight.shape) == (site.in_features, site.out_features)
        elif site.kind == SiteKind.KV:
            assert module.k_proj.out_features == site.out_features == spec.kv_heads * spec.head_dim
        else:
            assert site.out_features == spec.hidden
    # Nothing that has weights is without a site.
    hooked = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert hooked == set(spec.by_path)


def test_sites_are_in_forward_order() -> None:
    spec = describe(LlamaConfig(num_hidden_layers=2), "x")
    names = list(spec.sites)
    layer = ["attn.norm", "attn.q", "attn.k", "attn.v", "attn.kv", "attn.o", "attn.out"]
    layer += ["mlp.norm", "mlp.gate", "mlp.up", "mlp.down", "mlp.out"]
    every = [f"layers.{index}.{name}" for index in range(2) for name in layer]
    assert names == ["embed", *every, "norm", "head"]
    assert all(site.name == name for name, site in spec.sites.items())
