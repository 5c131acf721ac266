"""What PEFT cannot say is refused, naming component and reason; and how the writer reckons with PEFT's own rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from torch import Tensor
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import UnsupportedDelta
from deltas.formats import peft_writer
from deltas.formats.peft_writer import entries, factors, prompts, transforms
from deltas.formats.peft_writer.form import Here, patterns, plain, targets
from deltas.methods import METHODS
from deltas.sites import BackboneSpec

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(n_embd=32, n_inner=48, n_layer=2, n_head=4, vocab_size=61),
    "bert": BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    ),
}
SPECS: dict[str, BackboneSpec] = {name: describe(config, "test") for name, config in CONFIGS.items()}
Q = "layers.0.attn.q"


def part(method: str, tensors: dict[str, Tensor], **config: Any) -> Component:
    return Component(method, config, tensors)


def lora(*sites: str, **config: Any) -> Component:
    spec = SPECS["llama"]
    tensors = {f"{name}/A": torch.ones(2, spec.sites[name].in_features) for name in sites}
    tensors |= {f"{name}/B": torch.ones(spec.sites[name].out_features, 2) for name in sites}
    return part("lora", tensors, **({"scale": 1.0} | config))


def prefix(*sites: str, shifts: bool = True, heads: int = 2, length: int = 3) -> Component:
    tensors = {f"{s}/{p}": torch.ones(length, heads, 8) for s in sites for p in ("keys", "values")}
    return part("prefix", tensors, shifts_positions=shifts)


BOTTLENECK = part(
    "bottleneck",
    {
        "layers.0.mlp.out/down": torch.ones(3, 32),
        "layers.0.mlp.out/down_bias": torch.ones(3),
        "layers.0.mlp.out/up": torch.ones(32, 3),
        "layers.0.mlp.out/up_bias": torch.ones(32),
    },
    activation="relu",
    reads="output",
    scale=1.0,
)
PROMPT = part("prompt", {"embeddings": torch.ones(3, 32)})
KV = [f"layers.{i}.attn.kv" for i in (0, 1)]
GAIN, INPUT = part("ia3", {f"{Q}/gain": torch.ones(32)}), part("ia3", {f"{Q}/input_gain": torch.ones(32)})
MAGNITUDE = {f"{Q}/A": torch.ones(2, 32), f"{Q}/B": torch.ones(32, 2), f"{Q}/magnitude": torch.ones(32)}
TOKENS = {"embed/indices": torch.tensor([3]), "embed/rows": torch.ones(1, 32)}
HEAD = part(
    "head",
    {"layers.0/weight": torch.ones(3, 32)},
    kind="classify",
    pooling="mean",
    activations=["identity"],
    labels=None,
)
CLASSIFIER = Component(
    "head", HEAD.config | {"pooling": "last"}, HEAD.tensors | {"layers.0/bias": torch.ones(3)}
)

REFUSED: dict[str, tuple[str, list[Component], str]] = {
    "a method that PEFT has not": (
        "llama",
        [BOTTLENECK],
        r"component 0 \(bottleneck\): PEFT has no adapters",
    ),
    "its second component": ("llama", [lora(Q), BOTTLENECK], r"component 1 \(bottleneck\)"),
    "two of one method": ("llama", [lora(Q), lora(Q)], r"component 0 \(lora\) and component 1 \(lora\)"),
    "something beside a prompt": (
        "llama",
        [PROMPT, part("ln", {"norm/weight": torch.ones(32)})],
        "puts nothing beside PROMPT_TUNING",
    ),
    "a prompt after the norm": (
        "bert",
        [part("prompt", dict(PROMPT.tensors), after_norm=True)],
        "after the embedding norm",
    ),
    "a prefix without positions": ("llama", [prefix(*KV, shifts=False)], "leaves positions"),
    "a prefix in some layers": ("llama", [prefix(KV[1])], "no prefix at layers.0.attn.kv"),
    "gains of input and output": ("llama", [GAIN, INPUT], "holds one method"),
    "rotations of Conv1D": (
        "gpt2",
        [part("hra", {"layers.0.mlp.up/u": torch.ones(32, 2)})],
        r"transformer\.h\.0\.mlp\.c_fc is a Conv1D",
    ),
    "a part of a fused linear": (
        "gpt2",
        [part("hira", {f"{Q}/A": torch.ones(2, 32), f"{Q}/B": torch.ones(32, 2)})],
        "a part of transformer.h.0.attn.c_attn",
    ),
    "DoRA of a part": (
        "gpt2",
        [part("lora", MAGNITUDE, scale=1.0, dora="peft")],
        "depends on the weight of layers.0.attn.q",
    ),
    "AdapterHub's DoRA over a bias": (
        "bert",
        [part("lora", MAGNITUDE, scale=1.0, dora="adapterhub")],
        "scales the bias too",
    ),
    "ranks where PEFT has one": (
        "llama",
        [part("hra", {f"{Q}/u": torch.ones(32, 2), "layers.0.attn.k/u": torch.ones(32, 3)})],
        "differ in rank",
    ),
    "a norm's shift": ("llama", [part("bitfit", {"norm/beta": torch.ones(32)})], "linears only"),
    "a bias where there is none": (
        "llama",
        [part("override", {f"{Q}/bias": torch.ones(32), f"{Q}/weight": torch.ones(32, 32)})],
        "the backbone has none",
    ),
    "a shift where there is no bias": (
        "llama",
        [lora(Q), part("bitfit", {f"{Q}/beta": torch.ones(32)})],
        r"bitfit: it shifts layers\.0\.attn\.q",
    ),
    "values of a wrapped module": (
        "llama",
        [lora(Q), part("override", {f"{Q}/weight": torch.ones(32, 32)})],
        "override: it replaces the values of layers.0.attn.q, which LORA changes",
    ),
    "tokens of half of what is tied": ("llama", [part("tokens", TOKENS)], "only some of what is tied"),
    "tokens beside another type": ("llama", [GAIN, part("tokens", TOKENS)], "beside LORA only"),
    "a head alone": ("llama", [HEAD], "beside another method only"),
    "a head of another make": ("llama", [lora(Q), HEAD], "not the head of llama's own class"),
    "a head with a bias that PEFT's has not": ("llama", [lora(Q), CLASSIFIER], "its bias"),
    "weights that are not at hand": (
        "llama",
        [lora(Q), part("override", {"layers.1.mlp.up/bias": torch.ones(48)})],
        "not at hand",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_say_is_refused(name: str) -> None:
    family, components, message = REFUSED[name]
    with pytest.raises(UnsupportedDelta, match=message) as caught:
        peft_writer.export(Delta(tuple(components)), SPECS[family])
    assert caught.value.field


def test_every_method_is_written_or_has_a_reason() -> None:
    refused = [name for names in peft_writer.REFUSED for name in names]
    assert sorted([*peft_writer.WRITTEN, *refused]) == sorted(METHODS)


def test_a_config_key_that_no_writer_knows_is_refused() -> None:
    """Else a method's new option would be lost on the way."""
    with pytest.raises(UnsupportedDelta, match=r"component 0 \(lora\): PEFT has nothing for its twist"):
        peft_writer.export(Delta((lora(Q, twist=3),)), SPECS["llama"])


def test_names_are_short_and_mean_nothing_else() -> None:
    bert = SPECS["bert"]
    both = [
        f"bert.encoder.layer.{i}.{part}dense" for i in (0, 1) for part in ("attention.output.", "output.")
    ]
    assert targets(both, bert) == ["output.dense"]
    assert targets(both[1::2], bert) == ["0.output.dense", "1.output.dense"]
    assert targets(both[0::2], bert) == ["attention.output.dense"]
    assert targets([*both, "lm_head"], SPECS["llama"]) == ["lm_head", "output.dense"]
    # IA3's feed-forward modules are compared by their ends, dots or not
    assert targets(["a.b.o"], bert, others=["a.b.wo"]) == ["b.o"]
    assert targets(["a.b.o"], bert, others=["a.b.ff"]) == ["o"]


def test_exceptions_are_named_by_the_same_rule() -> None:
    values = {
        f"model.layers.{i}.mlp.{m}_proj": 8 if m == "up" else 4 + i for i in (0, 1) for m in ("up", "gate")
    }
    assert patterns(values, 4, SPECS["llama"]) == {"up_proj": 8, "1.mlp.gate_proj": 5}


@pytest.mark.parametrize(("value", "wanted"), [(16.000000000000004, 16), (2.1, 2.1), (0.0, 0), (1e-9, 1e-9)])
def test_numbers_are_plain(value: float, wanted: float) -> None:
    assert plain(value) == wanted
    assert type(plain(value)) is type(wanted)


def test_sizes_are_split_as_peft_splits_them() -> None:
    for size in range(1, 130):
        for factor in (-1, *range(1, 40)):
            assert factors._split(size, factor) == factorization(size, factor), (size, factor)


def test_blocks_are_adjusted_as_peft_adjusts_them() -> None:
    adjust: Callable[[Any, int, int], int] = OFTLayer.adjust_oft_parameters
    for width in range(1, 70):
        for asked in range(1, 80):
            if width % asked:
                assert transforms._adjusted(width, asked) == adjust(None, width, asked), (width, asked)


@pytest.mark.parametrize("layers", [[1, 2, 3], [1, 2, 1, 2], [1, 2, 3, 4, 5], [1, 2, 3, 1, 2, 3]])
def test_a_t5_s_slots_are_where_peft_looks_for_them(layers: list[int]) -> None:
    slots = [torch.full((1, 1), float(value)) for layer in layers for value in (layer, -layer)]
    folded = prompts._folded(slots)
    repeated = folded + folded  # as PEFT does, before it gives decoder layer l the slots 4l and 4l + 1
    for layer, value in enumerate(layers):
        assert [float(slot) for slot in repeated[4 * layer : 4 * layer + 2]] == [value, -value]


def test_a_t5_s_layers_that_peft_cannot_tell_apart_are_refused() -> None:
    slots = [torch.full((1, 1), float(layer)) for layer in (1, 1, 2, 2, 3, 3, 2, 2)]
    with pytest.raises(UnsupportedDelta, match="share one prefix"):
        prompts._folded(slots)


@pytest.mark.parametrize("sparsity", [0.99, 0.5, 0.123, 0.9999])
def test_a_sparsity_is_found_by_the_counts_it_gives(sparsity: float) -> None:
    sites = [SPECS["llama"].sites[name] for name in ("layers.0.mlp.up", "head", Q)]
    sizes = {site: site.in_features * site.out_features for site in sites}
    here = [Here(site, {"values": torch.zeros(int(size * (1 - sparsity)))}) for site, size in sizes.items()]
    found = entries._sparsity(here)
    assert [int(size * (1 - found)) for size in sizes.values()] == [h.size("values") for h in here]
