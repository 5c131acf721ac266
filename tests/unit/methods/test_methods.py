"""Lowering: layout, scale and merging of patches; shapes that do not fit are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS, check, lower, rank
from deltas.patches import Activation, BlockInput, Bottleneck, LowRank, Shift, SoftPrompt
from deltas.sites import BackboneSpec

Q, GATE, OUT = "layers.0.attn.q", "layers.1.mlp.gate", "layers.1.mlp.out"


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=20,
    )
    return describe(config, "test")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(site: str, r: int, into: int, out: int, **config: Any) -> Component:
    return Component("lora", {"scale": 1.0} | config, {f"{site}/A": draw(r, into), f"{site}/B": draw(out, r)})


def bitfit(**betas: int) -> Component:
    sites = {name.replace("_", "."): size for name, size in betas.items()}
    return Component("bitfit", {}, {f"{site}/beta": draw(size) for site, size in sites.items()})


def bottleneck(site: str, m: int, **config: Any) -> Component:
    tensors = {"down": draw(m, 8), "down_bias": draw(m), "up": draw(8, m), "up_bias": draw(8)}
    return Component(
        "bottleneck",
        {"activation": "relu", "reads": "output", "scale": 4.0} | config,
        {f"{site}/{name}": tensor for name, tensor in tensors.items()},
    )


def prompt(n: int) -> Component:
    return Component("prompt", {}, {"embeddings": draw(n, 8)})


def test_methods_are_listed_by_their_own_names() -> None:
    assert all(METHODS[name].name == name for name in METHODS)


def test_lora(spec: BackboneSpec) -> None:
    part = lora(GATE, 3, 8, 12, scale=2.0, scales={GATE: 0.5})
    (patch,) = lower(Delta((part,)), spec)
    assert isinstance(patch, LowRank)
    x = draw(5, 8)
    expected = 0.5 * x @ part.tensors[f"{GATE}/A"].T @ part.tensors[f"{GATE}/B"].T
    torch.testing.assert_close((x @ patch.down.T) @ patch.up, expected)
    assert rank(Delta((part,))) == 3


def test_bottleneck(spec: BackboneSpec) -> None:
    part = bottleneck(OUT, 3, activation="gelu_tanh", reads="output+residual")
    (patch,) = lower(Delta((part,)), spec)
    assert isinstance(patch, Bottleneck)
    assert (patch.activation, patch.reads) == (Activation.GELU_TANH, BlockInput.OUTPUT_AND_RESIDUAL)
    tensors = part.at(OUT)
    z = draw(5, 8)
    inner = torch.tanh(z @ tensors["down"].T + tensors["down_bias"])
    expected = 4.0 * (inner @ tensors["up"].T + tensors["up_bias"])
    got = torch.tanh(z @ patch.down.T + patch.down_bias) @ patch.up + patch.up_bias
    torch.testing.assert_close(got, expected)
    assert patch.up.is_contiguous()
    assert rank(Delta((part,))) == 3


def test_bitfit_covers_linears_norms_and_the_head(spec: BackboneSpec) -> None:
    part = bitfit(norm=8, head=16, layers_0_attn_q=8)
    patches = lower(Delta((part,)), spec)
    assert [patch.site for patch in patches if isinstance(patch, Shift)] == [Q, "norm", "head"]
    assert rank(Delta((part,))) is None


def test_prompt(spec: BackboneSpec) -> None:
    (patch,) = lower(Delta((prompt(4),)), spec)
    assert isinstance(patch, SoftPrompt)
    assert torch.equal(patch.embeddings, draw(4, 8))


def test_two_loras_at_one_site_are_their_sum(spec: BackboneSpec) -> None:
    first, second = lora(Q, 2, 8, 8, scale=3.0), lora(Q, 3, 8, 8)
    (patch,) = lower(Delta((first, second)), spec)
    assert isinstance(patch, LowRank)
    assert patch.down.shape == patch.up.shape == (5, 8)
    x = draw(4, 8)
    parts = [lower(Delta((part,)), spec)[0] for part in (first, second)]
    expected = sum((x @ p.down.T) @ p.up for p in parts if isinstance(p, LowRank))
    torch.testing.assert_close((x @ patch.down.T) @ patch.up, expected)
    assert rank(Delta((first, second))) == 3


def test_two_shifts_at_one_site_are_added(spec: BackboneSpec) -> None:
    (patch,) = lower(Delta((bitfit(norm=8), bitfit(norm=8))), spec)
    assert isinstance(patch, Shift)
    torch.testing.assert_close(patch.beta, 2 * draw(8))


def test_different_methods_combine(spec: BackboneSpec) -> None:
    delta = Delta((lora(Q, 2, 8, 8), bitfit(layers_0_attn_q=8), bottleneck(OUT, 6), prompt(2)))
    assert {type(patch) for patch in lower(delta, spec)} == {LowRank, Shift, Bottleneck, SoftPrompt}
    assert rank(delta) == 6


def test_two_prompts_are_refused(spec: BackboneSpec) -> None:
    for use in (check, lower):
        with pytest.raises(UnsupportedDelta) as caught:
            use(Delta((prompt(2), prompt(2))), spec)
        assert caught.value.field == "components"


def test_two_bottlenecks_at_one_site_apply_in_order(spec: BackboneSpec) -> None:
    first, second = lower(Delta((bottleneck(OUT, 2), bottleneck(OUT, 3))), spec)
    assert isinstance(first, Bottleneck)
    assert isinstance(second, Bottleneck)
    assert (len(first.down), len(second.down)) == (2, 3)


def test_nothing_is_no_delta(spec: BackboneSpec) -> None:
    for parts in ((), (Component("lora", {"scale": 1.0}, {}),), (Component("bitfit", {}, {}),)):
        with pytest.raises(InvalidDelta):
            check(Delta(parts), spec)


@pytest.mark.parametrize(
    "part",
    [
        lora(Q, 2, 9, 8),
        lora(Q, 2, 8, 9),
        lora(Q, 0, 8, 8),
        bottleneck(OUT, 0),
        lora("norm", 2, 8, 8),
        lora("embed", 2, 17, 8),
        lora(OUT, 2, 8, 8),
        lora("layers.2.attn.q", 2, 8, 8),
        bitfit(layers_0_attn_q=9),
        bitfit(embed=8),
        bitfit(layers_0_attn_out=8),
        bitfit(layers_0_attn_kv=8),
        bottleneck(Q, 2),
        bottleneck("norm", 2),
        prompt(20),
        Component("prompt", {}, {"embeddings": draw(0, 8)}),
        Component("prompt", {}, {"embeddings": draw(2, 2, 8)}),
        Component("prompt", {}, {"embeddings": draw(2, 8), "more": draw(1)}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(part: Component, spec: BackboneSpec) -> None:
    with pytest.raises(InvalidDelta) as caught:
        lower(Delta((part,)), spec)
    assert caught.value.field in part.tensors


def test_lowering_is_in_float32(spec: BackboneSpec) -> None:
    for part in (lora(Q, 2, 8, 8), bitfit(norm=8), bottleneck(OUT, 2), prompt(2)):
        half = Component(part.method, part.config, {n: t.bfloat16() for n, t in part.tensors.items()})
        (patch,) = lower(Delta((half,)), spec)
        tensors = [getattr(patch, name) for name in patch.__slots__]
        assert {t.dtype for t in tensors if isinstance(t, Tensor)} == {torch.float32}
        assert all(t.is_contiguous() for t in tensors if isinstance(t, Tensor))


@pytest.mark.parametrize(
    ("method", "config", "field"),
    [
        ("lora", {}, "scale"),
        ("lora", {"scale": float("nan")}, "scale"),
        ("lora", {"scale": float("inf")}, "scale"),
        ("lora", {"scale": 10**400}, "scale"),
        ("lora", {"scale": True}, "scale"),
        ("lora", {"scale": 1, "scales": []}, "scales"),
        ("lora", {"scale": 1, "scales": {Q: None}}, "scales"),
        ("lora", {"scale": 1, "alpha": 2}, "alpha"),
        ("bottleneck", {"activation": "relu", "reads": "output"}, "scale"),
        ("bottleneck", {"activation": "prelu", "reads": "output", "scale": 1}, "activation"),
        ("bottleneck", {"activation": ["relu"], "reads": "output", "scale": 1}, "activation"),
        ("bottleneck", {"activation": "relu", "reads": "input", "scale": 1}, "reads"),
        ("bitfit", {"x": 1}, "x"),
        ("prompt", {"x": 1}, "x"),
    ],
)
def test_configs_that_are_refused(method: str, config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        METHODS[method].normalise(config)
    assert caught.value.field == field
