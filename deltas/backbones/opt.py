"""Sites of OPT: pre-norm, layer norms, learned positions behind two rows that no token uses."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from deltas.backbones.usual import usual_spec
from deltas.errors import UnsupportedBackbone
from deltas.sites import BackboneSpec, Site, SiteKind

UNUSED_POSITIONS = 2  # rows before that of position 0


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of an ``OPTForCausalLM`` with this configuration.

    Raises :class:`UnsupportedBackbone` for the variant that OPT-350m is (norms behind the sublayers, embeddings of
    another width than the layers), for norms without weights, and for one without its last norm.
    """
    hidden = int(config.hidden_size)
    refused = {
        "do_layer_norm_before": (not config.do_layer_norm_before, "norms behind the sublayers"),
        "word_embed_proj_dim": (int(config.word_embed_proj_dim) != hidden, "projected embeddings"),
        "layer_norm_elementwise_affine": (
            not config.layer_norm_elementwise_affine,
            "norms without weights",
        ),
        "_remove_final_layer_norm": (config._remove_final_layer_norm, "no last norm"),
    }
    for option, (set_so, what) in refused.items():
        if set_so:
            raise UnsupportedBackbone(f"OPT with {what} is not supported ({option})", field=option)
    return usual_spec(config, "opt", revision, _sites(config))


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them."""
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    positions = int(config.max_position_embeddings) + UNUSED_POSITIONS
    yield Site("embed", SiteKind.EMBEDDING, "model.decoder.embed_tokens", vocab, hidden)
    yield Site("embed.positions", SiteKind.EMBEDDING, "model.decoder.embed_positions", positions, hidden)
    for index in range(int(config.num_hidden_layers)):
        yield from _layer(f"layers.{index}", f"model.decoder.layers.{index}", config)
    yield Site("norm", SiteKind.NORM, "model.decoder.final_layer_norm", hidden, hidden, bias=True)
    yield Site("head", SiteKind.LINEAR, "lm_head", hidden, vocab)


def _layer(name: str, path: str, config: PretrainedConfig) -> Iterator[Site]:
    hidden, inner, bias = int(config.hidden_size), int(config.ffn_dim), bool(config.enable_bias)
    attention, first, second = f"{path}.self_attn", f"{path}.self_attn_layer_norm", f"{path}.final_layer_norm"

    yield Site(f"{name}.attn.norm", SiteKind.NORM, first, hidden, hidden, bias=True)
    for leaf in "qkv":
        yield Site(f"{name}.attn.{leaf}", SiteKind.LINEAR, f"{attention}.{leaf}_proj", hidden, hidden, bias)
    yield Site(f"{name}.attn.kv", SiteKind.KV, attention, hidden, hidden)
    yield Site(f"{name}.attn.o", SiteKind.LINEAR, f"{attention}.out_proj", hidden, hidden, bias)
    yield Site(
        f"{name}.attn.out",
        SiteKind.BLOCK,
        f"{attention}.out_proj",
        hidden,
        hidden,
        residual=first,
        inner=f"{attention}.q_proj",
    )
    yield Site(f"{name}.mlp.norm", SiteKind.NORM, second, hidden, hidden, bias=True)
    yield Site(f"{name}.mlp.up", SiteKind.LINEAR, f"{path}.fc1", hidden, inner, bias)
    yield Site(f"{name}.mlp.down", SiteKind.LINEAR, f"{path}.fc2", inner, hidden, bias)
    yield Site(
        f"{name}.mlp.out",
        SiteKind.BLOCK,
        f"{path}.fc2",
        hidden,
        hidden,
        residual=second,
        inner=f"{path}.fc1",
    )
