"""What each family's table says: names in order, sizes, and the configurations that are refused."""

from __future__ import annotations

import pytest
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
)

from deltas.backbones import describe, families
from deltas.errors import UnsupportedBackbone
from deltas.sites import BackboneSpec, SiteKind
from tests.unit.backbones import tiny


def leaves(spec: BackboneSpec, stem: str) -> list[str]:
    """The names below ``stem``, in the table's order."""
    return [name.removeprefix(f"{stem}.") for name in spec.sites if name.startswith(f"{stem}.")]


def gpt2(**options: object) -> BackboneSpec:
    return describe(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=48, **options), "r1"
    )


def test_gpt2() -> None:
    spec = gpt2(n_inner=48)
    assert (spec.family, spec.kind, spec.base_prefix) == ("gpt2", "decoder", "transformer")
    assert (spec.conv1d, spec.pre_norm, spec.max_positions) == (True, True, 48)
    assert (spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (32, 2, 4, 4, 8)
    attention = ["norm", "qkv", "q", "k", "v", "kv", "o", "out"]
    layer = [f"attn.{leaf}" for leaf in attention] + [f"mlp.{leaf}" for leaf in ("norm", "up", "down", "out")]
    every = [f"layers.{i}.{leaf}" for i in range(2) for leaf in layer]
    assert list(spec.sites) == ["embed", "embed.positions", *every, "norm", "head"]
    assert spec.sites["layers.1.mlp.up"].out_features == 48


def test_gpt2_inner_width_is_four_times_hidden_unless_told() -> None:
    assert gpt2().sites["layers.0.mlp.up"].out_features == 128


def test_gpt2_fused_linear_and_its_parts() -> None:
    spec = gpt2()
    whole = spec.sites["layers.1.attn.qkv"]
    parts = spec.parts_of(whole)
    assert [(part.name[-1], part.offset, part.out_features) for part in parts] == [
        ("q", 0, 32),
        ("k", 32, 32),
        ("v", 64, 32),
    ]
    assert all(part.part and part.path == whole.path and part.in_features == 32 for part in parts)
    assert (whole.part, whole.offset, whole.out_features) == (False, 0, 96)
    assert spec.by_path[whole.path] is whole
    assert spec.parts_of(spec.sites["layers.1.attn.o"]) == []


@pytest.mark.parametrize(("family", "config"), [("bert", BertConfig), ("roberta", RobertaConfig)])
def test_post_norm_encoders(family: str, config: type[PretrainedConfig]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    spec = describe(config(**sizes, vocab_size=61, max_position_embeddings=48, pad_token_id=1), "r1")
    assert (spec.family, spec.kind, spec.base_prefix) == (family, "encoder", family)
    assert (spec.conv1d, spec.pre_norm) == (False, False)
    assert (spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (32, 2, 4, 4, 8)
    layer = [f"attn.{leaf}" for leaf in ("q", "k", "v", "kv", "o", "out", "norm")]
    layer += [f"mlp.{leaf}" for leaf in ("up", "down", "out", "norm")]
    every = [f"layers.{i}.{leaf}" for i in range(2) for leaf in layer]
    embed = ["embed", "embed.types", "embed.positions", "embed.norm"]
    assert list(spec.sites) == [*embed, *every, "head.dense", "head.norm", "head"]
    block = spec.sites["layers.1.mlp.out"]
    assert block.norm == f"{family}.encoder.layer.1.output.LayerNorm"
    assert block.residual == block.inner == f"{family}.encoder.layer.1.intermediate.dense"


def test_positions_of_roberta_begin_after_the_padding_token() -> None:
    sizes = {"max_position_embeddings": 514, "pad_token_id": 1}
    assert describe(RobertaConfig(**sizes), "r1").max_positions == 512
    assert describe(BertConfig(**sizes), "r1").max_positions == 514
    assert describe(RobertaConfig(**sizes), "r1").sites["embed.positions"].in_features == 514


@pytest.mark.parametrize("gated", [False, True])
def test_t5(gated: bool) -> None:
    spec = describe(
        T5Config(
            d_model=32,
            d_kv=10,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            vocab_size=61,
            feed_forward_proj="gated-gelu" if gated else "relu",
        ),
        "r1",
    )
    assert (spec.family, spec.kind, spec.base_prefix) == ("t5", "encoder-decoder", "")
    assert (spec.hidden, spec.layers, spec.kv_heads, spec.head_dim) == (32, 2, 4, 10)
    attention = ["norm", "q", "k", "v", "kv", "o", "out"]
    mlp = ["norm", *(["gate"] if gated else []), "up", "down", "out"]
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        assert {name.split(".")[2] for name in spec.sites if name.startswith(f"{stack}.layers.")} == {
            str(i) for i in range(layers)
        }
        for i in range(layers):
            assert leaves(spec, f"{stack}.layers.{i}.attn") == attention
            assert leaves(spec, f"{stack}.layers.{i}.cross") == (attention if stack == "decoder" else [])
            assert leaves(spec, f"{stack}.layers.{i}.mlp") == mlp
        assert spec.sites[f"{stack}.positions"].kind is SiteKind.EMBEDDING
    kv = [site.name for site in spec.of_kind(SiteKind.KV)]
    decoder = [f"decoder.layers.{i}.{leaf}.kv" for i in range(3) for leaf in ("attn", "cross")]
    assert kv == ["encoder.layers.0.attn.kv", "encoder.layers.1.attn.kv", *decoder]


def test_t5_has_as_many_positions_as_it_was_trained_with() -> None:
    assert describe(T5Config(), "r1").max_positions == 512
    assert describe(T5Config(n_positions=1024), "r1").max_positions == 1024


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(add_cross_attention=True),
        BertConfig(is_decoder=True),
        BertConfig(is_decoder=True, add_cross_attention=True),
        BertConfig(position_embedding_type="relative_key"),
        RobertaConfig(is_decoder=True),
        RobertaConfig(position_embedding_type="relative_key_query"),
    ],
)
def test_what_no_table_describes_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(UnsupportedBackbone) as caught:
        describe(config, "r1")
    assert caught.value.field in ("add_cross_attention", "is_decoder", "position_embedding_type")


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (OPTConfig(do_layer_norm_before=False), "do_layer_norm_before"),
        (OPTConfig(word_embed_proj_dim=512), "word_embed_proj_dim"),
        (OPTConfig(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
        (OPTConfig(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
        (GemmaConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (LlamaConfig(rope_parameters=LONGROPE), "rope_parameters"),
        (
            Gemma3TextConfig(
                rope_parameters={
                    "full_attention": LONGROPE,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            ),
            "rope_parameters",
        ),
        (GPTNeoXConfig(rope_parameters=LONGROPE), "rope_parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_the_decoders_tables_do_not_describe_is_refused(config: PretrainedConfig, field: str) -> None:
    with pytest.raises(UnsupportedBackbone) as caught:
        describe(config, "r1")
    assert caught.value.field == field


def attention(spec: BackboneSpec) -> list[str]:
    return leaves(spec, "layers.1.attn")


def test_decoders_of_llamas_shape() -> None:
    specs = {name: describe(config(), "r1") for name, config in tiny.CONFIGS.items()}
    plain = ["norm", "q", "k", "v", "kv", "o", "out"]
    for name in ("mistral", "mistral windowed", "qwen2", "gemma"):
        assert attention(specs[name]) == plain
        assert leaves(specs[name], "layers.0.mlp") == ["norm", "gate", "up", "down", "out"]
    assert attention(specs["qwen3"]) == ["norm", "q", "q_norm", "k", "k_norm", "v", "kv", "o", "out"]
    assert attention(specs["gemma2"]) == [*plain[:-1], "outer_norm", "out"]
    assert attention(specs["gemma3_text"]) == [*plain[:4], "q_norm", "k_norm", "kv", "o", "outer_norm", "out"]
    biased = {
        name: [leaf for leaf in "qkvo" if spec.sites[f"layers.0.attn.{leaf}"].bias]
        for name, spec in specs.items()
        if "layers.0.attn.q" in spec.sites
    }
    assert biased.pop("qwen2") == biased.pop("qwen2 windowed") == ["q", "k", "v"]
    assert biased.pop("qwen3 windowed") == biased.pop("opt") == ["q", "k", "v", "o"]
    assert not any(biased.values())
    for name, spec in specs.items():
        assert spec.family == tiny.family_of(name)
        assert spec.kv_heads == {"gemma": 1, "gpt_neox": 4, "opt": 4}.get(spec.family, 2)
        free = name in ("mistral", "qwen3", "qwen3 windowed") or spec.family.startswith("gemma")
        assert spec.head_dim == (10 if free else 8)
        assert spec.sites["embed"].scale == (32**0.5 if spec.family.startswith("gemma") else 1.0)


def test_gpt_neox_has_one_linear_for_attention() -> None:
    spec = describe(tiny.CONFIGS["gpt_neox"](), "r1")
    assert attention(spec) == ["norm", "qkv", "kv", "o", "out"]
    whole = spec.sites["layers.1.attn.qkv"]
    assert (whole.out_features, spec.parts_of(whole)) == (96, [])
    assert leaves(spec, "layers.1.mlp") == ["norm", "up", "down", "out"]
    assert (spec.base_prefix, spec.max_positions) == ("gpt_neox", 48)


def test_positions_of_opt_begin_behind_two_rows() -> None:
    spec = describe(tiny.CONFIGS["opt"](), "r1")
    assert (spec.sites["embed.positions"].in_features, spec.max_positions) == (50, 48)
    assert list(spec.sites)[:2] == ["embed", "embed.positions"]


def test_other_families_are_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedBackbone, match=rf"'clvp'.*{', '.join(families())}$") as caught:
        describe(PretrainedConfig(model_type="clvp"), "r1")
    assert caught.value.field == "model_type"
