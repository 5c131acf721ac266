"""The two methods that only OpenDelta has: its rank-one adapter, and its prefixes in a T5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from deltas import methods
from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.patches import Activation, BlockInput, Bottleneck, KVPrefix
from deltas.sites import BackboneSpec

BACKBONES = Path(__file__).parents[2] / "oracle" / "fixtures" / "backbones"


def spec_of(family: str) -> BackboneSpec:
    return describe(AutoConfig.from_pretrained(BACKBONES / family), "test")


def low_rank_adapter(**changes: torch.Tensor) -> Delta:
    tensors = {
        "down_left": torch.randn(32, 1),
        "down_right": torch.randn(1, 4),
        "down_bias": torch.randn(4),
        "up_left": torch.randn(4, 1),
        "up_right": torch.randn(1, 32),
        "up_bias": torch.randn(32),
    } | changes
    config = {"activation": "relu", "reads": "output", "scale": 1.0}
    named = {f"layers.1.mlp.out/{name}": tensor for name, tensor in tensors.items()}
    return Delta((Component("low_rank_adapter", config, named),))


def test_the_matrices_are_outer_products() -> None:
    delta = low_rank_adapter()
    (patch,) = methods.lower(delta, spec_of("llama"))
    tensors = delta.components[0].at("layers.1.mlp.out")
    assert isinstance(patch, Bottleneck)
    assert torch.equal(patch.down, torch.outer(tensors["down_right"][0], tensors["down_left"][:, 0]))
    assert torch.equal(patch.up, torch.outer(tensors["up_left"][:, 0], tensors["up_right"][0]))
    assert torch.equal(patch.down_bias, tensors["down_bias"])
    assert torch.equal(patch.up_bias, tensors["up_bias"])
    assert (patch.activation, patch.reads) == (Activation.RELU, BlockInput.OUTPUT)
    assert methods.rank(delta) == 4


@pytest.mark.parametrize("name", ["down_left", "down_right", "down_bias", "up_left", "up_right", "up_bias"])
def test_other_shapes_are_refused(name: str) -> None:
    delta = low_rank_adapter(**{name: torch.ones(2, 2)})
    with pytest.raises(InvalidDelta) as caught:
        methods.check(delta, spec_of("llama"))
    assert caught.value.field == f"layers.1.mlp.out/{name}"


def prefix(*sites: str, n: int = 3) -> Delta:
    tensors = {f"{site}/{name}": torch.randn(n, 4, 8) for site in sites for name in ("keys", "values")}
    return Delta((Component("opendelta_prefix", {}, tensors),))


def lowered(delta: Delta) -> list[KVPrefix]:
    patches = methods.lower(delta, spec_of("t5"))
    assert all(isinstance(patch, KVPrefix) for patch in patches)
    return [patch for patch in patches if isinstance(patch, KVPrefix)]


def test_biases_go_from_the_first_prefix_on() -> None:
    first, second = lowered(prefix("encoder.layers.0.attn.kv"))
    assert (first.site, len(first.keys), first.shifts_positions, first.unbiased) == (
        "encoder.layers.0.attn.kv",
        3,
        True,
        False,
    )
    assert (second.site, len(second.keys), second.shifts_positions, second.unbiased) == (
        "encoder.layers.1.attn.kv",
        0,
        False,
        True,
    )
    (only,) = lowered(prefix("decoder.layers.1.attn.kv"))
    assert (only.site, len(only.keys), only.unbiased) == ("decoder.layers.1.attn.kv", 3, True)


def test_a_network_s_output_is_keys_then_values_of_each_site() -> None:
    sites = ["encoder.layers.0.attn.kv", "decoder.layers.0.attn.kv"]
    tensors = {
        "prefix/tokens": torch.randn(3, 6),
        "prefix/down": torch.randn(7, 6),
        "prefix/down_bias": torch.randn(7),
        "prefix/up": torch.randn(128, 7),
        "prefix/up_bias": torch.randn(128),
    }
    config = {"stacks": {"prefix": sites}, "activation": "tanh", "length": 3}
    patches = lowered(Delta((Component("opendelta_prefix", config, tensors),)))
    hidden = torch.tanh(tensors["prefix/tokens"] @ tensors["prefix/down"].T + tensors["prefix/down_bias"])
    states = (hidden @ tensors["prefix/up"].T + tensors["prefix/up_bias"]).reshape(3, 4, 4, 8)
    found = {patch.site: patch for patch in patches}
    for j, site in enumerate(sites):
        torch.testing.assert_close(found[site].keys, states[:, 2 * j])
        torch.testing.assert_close(found[site].values, states[:, 2 * j + 1])


@pytest.mark.parametrize(
    ("family", "sites", "kind", "field"),
    [
        ("gpt2", ("layers.0.attn.kv",), UnsupportedDelta, "method"),
        ("t5", ("decoder.layers.0.cross.kv",), UnsupportedDelta, "decoder.layers.0.cross.kv"),
        ("t5", ("encoder.layers.7.attn.kv",), InvalidDelta, "encoder.layers.7.attn.kv/keys"),
    ],
)
def test_what_does_not_fit_is_refused(
    family: str, sites: tuple[str, ...], kind: type[DeltaError], field: str
) -> None:
    with pytest.raises(kind) as caught:
        methods.check(prefix(*sites), spec_of(family))
    assert caught.value.field == field


def test_a_prefix_that_keeps_the_biases_does_not_join_one_that_drops_them() -> None:
    site = "encoder.layers.1.attn.kv"
    other = Component(
        "prefix",
        {"shifts_positions": False},
        {f"{site}/{name}": torch.randn(2, 4, 8) for name in ("keys", "values")},
    )
    delta = Delta((prefix(site).components[0], other))
    with pytest.raises(UnsupportedDelta) as caught:
        methods.lower(delta, spec_of("t5"))
    assert caught.value.field == site
