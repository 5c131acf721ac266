"""AdapterHub's own methods: what they lower to, by their formulas; shapes and configs that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, LlamaConfig

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS, check, lower, rank
from deltas.patches import (
    Bottleneck,
    Coupling,
    Fusion,
    Gain,
    GatedGain,
    GatedLowRank,
    KVPrefix,
    LowRank,
    Patch,
)
from deltas.sites import BackboneSpec

H, M = 8, 4
OUT, Q, KV = "layers.0.mlp.out", "layers.1.attn.q", "layers.0.attn.kv"
READS = {"activation": "relu", "reads": "output"}


@pytest.fixture(scope="module")
def decoder() -> BackboneSpec:
    config = LlamaConfig(
        hidden_size=H, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=16
    )
    return describe(config, "test")


@pytest.fixture(scope="module")
def encoder() -> BackboneSpec:
    config = BertConfig(
        hidden_size=H, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=16
    )
    return describe(config, "test")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def part(method: str, config: dict[str, Any], **tensors: Tensor) -> Component:
    """``__`` in a name stands for the slash before the parameter, ``_at_`` for a site's dots."""
    named = {name.replace("_at_", ".").replace("__", "/"): tensor for name, tensor in tensors.items()}
    return Component(method, config, named)


def at(site: str, **tensors: Tensor) -> dict[str, Tensor]:
    return {f"{site}/{name}": tensor for name, tensor in tensors.items()}


def only(component: Component, spec: BackboneSpec) -> Patch:
    (patch,) = lower(Delta((component,)), spec, lambda _: None)
    return patch


def bottleneck(**more: Tensor) -> dict[str, Tensor]:
    return at(OUT, down=draw(M, H), down_bias=draw(M), up=draw(H, M), up_bias=draw(H), **more)


def hypercomplex(d: int = 2, k: int = 3) -> dict[str, Tensor]:
    return at(
        OUT,
        down_left=draw(d, H // d, k),
        down_right=draw(d, k, M // d),
        up=draw(d, M // d, H // d),
        up_bias=draw(H),
    ) | {"rule_left": draw(d, d, 1), "rule_right": draw(d, 1, d)}


def test_the_options_of_a_bottleneck(encoder: BackboneSpec) -> None:
    more = {
        "scaling": draw(H),
        "norm_before": draw(H),
        "norm_before_bias": draw(H),
        "norm_after": draw(H),
        "norm_after_bias": draw(H),
        "gate": draw(1, H),
        "gate_bias": draw(1),
    }
    config = {**READS, "scale": 2.0, "onto": "normed", "norm_around": True}
    patch = only(Component("bottleneck", config, bottleneck(**more)), encoder)
    assert isinstance(patch, Bottleneck)
    assert not patch.plain
    torch.testing.assert_close(patch.up, 2.0 * draw(H, M).T * draw(H))
    assert patch.norm_before is not None
    assert patch.gate is not None
    assert patch.norm_around
    plain = only(Component("bottleneck", {**READS, "scale": 1}, bottleneck()), encoder)
    assert isinstance(plain, Bottleneck)
    assert plain.plain


def test_compacter_forms_sums_of_kronecker_products(decoder: BackboneSpec) -> None:
    tensors = hypercomplex()
    component = Component("compacter", {**READS, "scale": 1.0}, tensors)
    patch = only(component, decoder)
    assert isinstance(patch, Bottleneck)
    rule = torch.bmm(tensors["rule_left"], tensors["rule_right"])
    weight = torch.bmm(tensors[f"{OUT}/down_left"], tensors[f"{OUT}/down_right"])
    down = sum(torch.kron(r, w) for r, w in zip(rule, weight, strict=True))
    up = sum(torch.kron(r, w) for r, w in zip(rule, tensors[f"{OUT}/up"], strict=True))
    torch.testing.assert_close(patch.down.T, down)
    torch.testing.assert_close(patch.up, up)
    assert not patch.down_bias.any()
    assert rank(Delta((component,))) == M


def test_compacter_may_share_everything(decoder: BackboneSpec) -> None:
    shared = {
        name.rpartition("/")[2]: tensor for name, tensor in hypercomplex().items() if "bias" not in name
    }
    config = {**READS, "scale": 1.0, "sites": [OUT, "layers.1.mlp.out"]}
    patches = lower(Delta((Component("compacter", config, shared),)), decoder)
    assert [p.site for p in patches if isinstance(p, Bottleneck)] == [OUT, "layers.1.mlp.out"]
    assert torch.equal(patches[0].down, patches[1].down)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({f"{OUT}/down_right": draw(2, 3, 3)}, f"{OUT}/up"),
        ({f"{OUT}/down_left": draw(2, 3, 3)}, f"{OUT}/down_right"),
        ({f"{OUT}/down_left": draw(4, 3)}, f"{OUT}/down_left"),
        ({f"{OUT}/up": draw(2, 2, 3)}, f"{OUT}/up"),
        ({f"{OUT}/up_bias": draw(M)}, f"{OUT}/up_bias"),
        ({"rule_left": draw(2, 2, 2)}, "rule_left"),
        ({"rule_right": None}, f"{OUT}/rule_right"),
        ({"rule_left": None}, f"{OUT}/rule"),
        ({f"{OUT}/down_left": None}, f"{OUT}/down_left"),
        ({f"{OUT}/down_right": draw(2, 3, 400)}, OUT),
        ({f"{OUT}/more": draw(1)}, f"{OUT}/more"),
    ],
)
def test_compacters_that_do_not_fit(
    decoder: BackboneSpec, change: dict[str, Tensor | None], field: str
) -> None:
    tensors = {name: t for name, t in (hypercomplex() | change).items() if t is not None}
    with pytest.raises(DeltaError) as caught:
        check(Delta((Component("compacter", {**READS, "scale": 1.0}, tensors),)), decoder)
    assert caught.value.field == field


def fusion(**more: Tensor | None) -> dict[str, Tensor]:
    parts = {
        f"{OUT}/{j}.{name}": draw(*shape)
        for j in (0, 1)
        for name, shape in {
            "down": (M + j, H),
            "down_bias": (M + j,),
            "up": (H, M + j),
            "up_bias": (H,),
        }.items()
    }
    attention: dict[str, Tensor | None] = {
        "query": draw(H, H),
        "query_bias": draw(H),
        "key": draw(H, H),
        "key_bias": draw(H),
        "value": draw(H, H),
    }
    named = {f"{OUT}/{name}": t for name, t in (attention | more).items()}
    return {name: t for name, t in (parts | named).items() if t is not None}


FUSION: dict[str, Any] = {
    "parts": [{"activation": "relu", "scale": 1.0}, {"activation": "silu", "scale": 2.0}],
    "reads": "output",
    "onto": "output",
    "query_reads": "output",
}


def test_fusion(decoder: BackboneSpec) -> None:
    component = Component("fusion", FUSION, fusion(value=None))
    patch = only(component, decoder)
    assert isinstance(patch, Fusion)
    assert [len(p.down) for p in patch.parts] == [M, M + 1]
    assert patch.value is None
    torch.testing.assert_close(patch.parts[1].up, 2.0 * draw(H, M + 1).T)
    assert rank(Delta((component,))) == 2 * M + 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"key_bias": None}, f"{OUT}/key"),
        ({"query": draw(H, M)}, f"{OUT}/query"),
        ({"0.up": None}, f"{OUT}/0.up"),
        ({"1.up_bias": draw(M)}, f"{OUT}/1.up_bias"),
        ({"2.down": draw(M, H)}, f"{OUT}/2.down"),
        ({"0.norm_before": draw(H)}, f"{OUT}/0.norm_before"),
    ],
)
def test_fusions_that_do_not_fit(decoder: BackboneSpec, change: dict[str, Tensor | None], field: str) -> None:
    tensors = {
        n: t for n, t in (fusion() | {f"{OUT}/{k}": v for k, v in change.items()}).items() if t is not None
    }
    with pytest.raises(InvalidDelta) as caught:
        check(Delta((Component("fusion", FUSION, tensors),)), decoder)
    assert caught.value.field == field


def coupling(site: str) -> Component:
    shapes = {"down": (3, H // 2), "down_bias": (3,), "up": (H // 2, 3), "up_bias": (H // 2,)}
    tensors = {f"{site}/{half}_{name}": draw(*shape) for half in "fg" for name, shape in shapes.items()}
    return Component("invertible", {"activation": "relu"}, tensors)


def test_invertible_adapters_are_at_the_embeddings(decoder: BackboneSpec, encoder: BackboneSpec) -> None:
    for spec, site in ((decoder, "embed"), (encoder, "embed.norm")):
        assert isinstance(only(coupling(site), spec), Coupling)
    for site in ("layers.0.attn.norm", "norm"):
        with pytest.raises(InvalidDelta):
            check(Delta((coupling(site),)), decoder)


def test_gates_are_refused_on_causal_backbones(decoder: BackboneSpec, encoder: BackboneSpec) -> None:
    gate = {"gate": draw(1, H), "gate_bias": draw(1)}
    lora = Component("gated_lora", {}, at(Q, A=draw(2, H), B=draw(H, 2), **gate))
    ia3 = Component("gated_ia3", {}, at(Q, gain=draw(H), **gate))
    adapter = Component("bottleneck", {**READS, "scale": 1.0}, bottleneck(**gate))
    prefix = Component(
        "packed_prefix",
        {"stacks": {"s": [KV]}, "activation": "identity", "length": 3},
        {"s/flat": draw(3 * 2 * H)} | at(KV, **gate),
    )
    kinds = (GatedLowRank, GatedGain, Bottleneck, KVPrefix)
    for component, kind in zip((lora, ia3, adapter, prefix), kinds, strict=True):
        patch = only(component, encoder)
        assert isinstance(patch, kind)
        assert getattr(patch, "gate", None) is not None
        with pytest.raises(UnsupportedDelta, match="causal"):
            check(Delta((component,)), decoder)


def test_packed_prefixes_lie_token_by_token(decoder: BackboneSpec) -> None:
    other = "layers.1.attn.kv"
    flat = torch.arange(3 * 4 * H, dtype=torch.float32)
    config = {"stacks": {"s": [KV, other]}, "activation": "identity", "length": 3}
    first, second = lower(Delta((Component("packed_prefix", config, {"s/flat": flat}),)), decoder)
    assert isinstance(first, KVPrefix)
    assert isinstance(second, KVPrefix)
    assert first.keys[0].flatten().tolist() == list(range(H))
    assert second.values[2].flatten().tolist() == list(range(11 * H, 12 * H))
    assert not first.shifts_positions
    made = {
        "s/tokens": draw(3, 5),
        "s/down": draw(2, 5),
        "s/down_bias": draw(2),
        "s/up": draw(4 * H, 2),
        "s/up_bias": draw(4 * H),
    }
    patches = lower(Delta((Component("packed_prefix", {**config, "activation": "tanh"}, made),)), decoder)
    inner = torch.tanh(F.linear(made["s/tokens"], made["s/down"], made["s/down_bias"]))
    wanted = F.linear(inner, made["s/up"], made["s/up_bias"])
    assert isinstance(patches[0], KVPrefix)
    torch.testing.assert_close(patches[0].values.reshape(3, H), wanted[:, H : 2 * H])


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"s/flat": draw(3 * 2 * H + 1)}, "s/flat"),
        ({"s/tokens": draw(3, 5)}, "s/down"),
        ({"s/flat": draw(3 * 2 * H), "t/flat": draw(1)}, "t/flat"),
        ({"s/flat": draw(3 * 2 * H), f"{KV}/gate": draw(1, H)}, f"{KV}/gate_bias"),
    ],
)
def test_packed_prefixes_that_do_not_fit(
    encoder: BackboneSpec, tensors: dict[str, Tensor], field: str
) -> None:
    config = {"stacks": {"s": [KV]}, "activation": "identity", "length": 3}
    with pytest.raises(InvalidDelta) as caught:
        check(Delta((Component("packed_prefix", config, tensors),)), encoder)
    assert caught.value.field == field


def test_vera_with_whole_matrices(decoder: BackboneSpec) -> None:
    shared = {"A": draw(2, H), "B": draw(H, 2)}
    own = at(Q, V=draw(H, H), U=draw(2, 2))
    patch = only(Component("dense_vera", {"scale": 3.0}, shared | own), decoder)
    assert isinstance(patch, LowRank)
    wanted = 3.0 * own[f"{Q}/V"] @ shared["B"] @ own[f"{Q}/U"] @ shared["A"]
    torch.testing.assert_close(patch.up.T @ patch.down, wanted)
    for bad in ({"A": draw(2, H - 1)}, {"B": draw(H, 3)}, {f"{Q}/V": draw(H, 2)}):
        with pytest.raises(InvalidDelta) as caught:
            check(Delta((Component("dense_vera", {"scale": 3.0}, shared | own | bad),)), decoder)
        assert caught.value.field in bad


def test_doras_norms_are_without_the_scale(decoder: BackboneSpec) -> None:
    weight = draw(H, H)
    tensors = at(Q, A=draw(2, H), B=draw(H, 2), magnitude=draw(H))
    component = Component("lora", {"scale": 3.0, "dora": "adapterhub"}, tensors)
    gain, low = lower(Delta((component,)), decoder, lambda _: weight)
    assert isinstance(gain, Gain)
    assert isinstance(low, LowRank)
    change = tensors[f"{Q}/B"] @ tensors[f"{Q}/A"]
    wanted = tensors[f"{Q}/magnitude"] / torch.linalg.vector_norm(weight + change, dim=1)
    torch.testing.assert_close(gain.gain, wanted)
    torch.testing.assert_close(low.up.T @ low.down, wanted[:, None] * 3.0 * change)


def test_mtl_loras_mean(decoder: BackboneSpec) -> None:
    tensors = at(Q, A=draw(2, H), B=draw(3, H, 2), values=draw(2), weights=draw(3))
    patch = only(Component("mtl_lora", {"scale": 2.0, "sharpness": 0.5}, tensors), decoder)
    assert isinstance(patch, LowRank)
    shares = (tensors[f"{Q}/weights"] / 0.5).exp()
    mean = (shares[:, None, None] * tensors[f"{Q}/B"]).sum(0) / shares.sum()
    torch.testing.assert_close(patch.up.T, 2.0 * mean * tensors[f"{Q}/values"])


@pytest.mark.parametrize(
    ("method", "config", "field"),
    [
        ("bottleneck", {**READS, "scale": 1, "onto": "input"}, "onto"),
        ("bottleneck", {**READS, "scale": 1, "norm_around": 1}, "norm_around"),
        ("compacter", {**READS, "scale": 1, "sites": []}, "sites"),
        ("compacter", {**READS, "scale": 1, "sites": [1]}, "sites"),
        ("fusion", {**FUSION, "parts": []}, "parts"),
        ("fusion", {**FUSION, "parts": [{"activation": "relu"}]}, "scale"),
        ("fusion", {**FUSION, "query_reads": None}, "query_reads"),
        ("invertible", {"activation": "prelu"}, "activation"),
        ("mtl_lora", {"scale": 1, "sharpness": 0}, "sharpness"),
        ("dense_vera", {}, "scale"),
        ("packed_prefix", {"stacks": {}, "activation": "tanh", "length": 1}, "stacks"),
        ("packed_prefix", {"stacks": {"s": [KV, KV]}, "activation": "tanh", "length": 1}, "stacks"),
        ("packed_prefix", {"stacks": {"s": [KV]}, "activation": "tanh", "length": 0}, "length"),
        ("gated_lora", {"scale": 1}, "scale"),
        ("ia3", {"scale": "2"}, "scale"),
    ],
)
def test_configs_that_are_refused(method: str, config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        METHODS[method].normalise(config)
    assert caught.value.field == field
