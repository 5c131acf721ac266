"""Heads whose layers end in a norm: their mathematics, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ModernBertConfig

from deltas import heads, methods
from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import DeltaError, UnsupportedDelta
from deltas.methods import METHODS
from deltas.patches import Head
from deltas.sites import BackboneSpec

HIDDEN = 8
TENSORS = {
    "layers.0/weight": torch.randn(6, HIDDEN),
    "layers.0/norm": torch.rand(6) + 0.5,
    "layers.0/norm_bias": torch.randn(6),
    "layers.1/weight": torch.randn(3, 6),
    "layers.1/bias": torch.randn(3),
}
CONFIG = {"kind": "classify", "pooling": "mean", "activations": ["gelu", "identity"], "labels": None}


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16, "pad_token_id": 0}
    return describe(ModernBertConfig(hidden_size=HIDDEN, intermediate_size=12, **sizes), "test")


def delta(method: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Delta:
    return Delta((Component(method, METHODS[method].normalise(config), dict(tensors)),))


def test_a_layer_is_normed_behind_its_activation(spec: BackboneSpec) -> None:
    made = delta("head", TENSORS, CONFIG | {"norm_eps": 0.1})
    methods.check(made, spec)
    (head,) = methods.lower(made, spec)
    assert isinstance(head, Head)
    hidden = torch.randn(5, HIDDEN)
    inner = F.gelu(TENSORS["layers.0/weight"] @ hidden.mean(0))
    normed = F.layer_norm(inner, (6,), TENSORS["layers.0/norm"], TENSORS["layers.0/norm_bias"], 0.1)
    wanted = TENSORS["layers.1/weight"] @ normed + TENSORS["layers.1/bias"]
    torch.testing.assert_close(heads.apply(head, hidden), wanted)


@pytest.mark.parametrize(
    ("changed", "config", "field"),
    [
        ({"layers.0/norm": None}, {"norm_eps": 1e-5}, "layers.0/norm"),
        ({"layers.0/norm": torch.ones(5)}, {"norm_eps": 1e-5}, "layers.0/norm"),
        ({"layers.0/norm_bias": torch.ones(1, 6)}, {"norm_eps": 1e-5}, "layers.0/norm_bias"),
        ({}, {}, "norm_eps"),
        ({"layers.0/norm": None, "layers.0/norm_bias": None}, {"norm_eps": 1e-5}, "norm_eps"),
        ({}, {"norm_eps": 0}, "norm_eps"),
        ({}, {"norm_eps": True}, "norm_eps"),
        ({}, {"norm_eps": "1e-5"}, "norm_eps"),
    ],
)
def test_what_does_not_fit_is_refused(
    changed: Mapping[str, Tensor | None], config: Mapping[str, Any], field: str, spec: BackboneSpec
) -> None:
    tensors = {name: tensor for name, tensor in (TENSORS | changed).items() if tensor is not None}
    with pytest.raises(DeltaError) as caught:
        methods.check(delta("head", tensors, CONFIG | config), spec)
    assert caught.value.field == field


def test_prefixes_and_late_prompts_have_no_place_in_modernbert(spec: BackboneSpec) -> None:
    states = torch.ones(2, spec.kv_heads, spec.head_dim)
    site = "layers.1.attn.kv"
    packed = {"self/flat": torch.ones(2 * 2 * HIDDEN)}
    stacks = {"stacks": {"self": [site]}, "activation": "identity", "length": 2}
    for made, field in (
        (
            delta("prefix", {f"{site}/keys": states, f"{site}/values": states}, {"shifts_positions": True}),
            site,
        ),
        (delta("packed_prefix", packed, stacks), "stacks"),
        (delta("prompt", {"embeddings": torch.ones(2, HIDDEN)}, {"after_norm": True}), "after_norm"),
    ):
        with pytest.raises(UnsupportedDelta) as caught:
            methods.check(made, spec)
        assert str(caught.value.field).startswith(field)
