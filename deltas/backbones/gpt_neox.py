"""Sites of GPT-NeoX (Pythia among them): layer norms, rotary positions, one linear for query, key and value.

That linear gives each head's query, key and value side by side, so there is no range of columns that is the queries:
it is one site without parts. Where the residual is parallel, both sublayers read the layer's input, and that is what a
bottleneck reads as the residual of either; otherwise the feed-forward's is what attention left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from deltas.backbones.rotary import check_positions
from deltas.backbones.usual import usual_spec
from deltas.sites import BackboneSpec, Site, SiteKind


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``GPTNeoXForCausalLM`` with this configuration.

    Raises :class:`UnsupportedBackbone` as :func:`check_positions` does.
    """
    check_positions(config)
    return replace(usual_spec(config, "gpt_neox", revision, _sites(config)), base_prefix="gpt_neox")


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them."""
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    yield Site("embed", SiteKind.EMBEDDING, "gpt_neox.embed_in", vocab, hidden)
    for index in range(int(config.num_hidden_layers)):
        yield from _layer(f"layers.{index}", f"gpt_neox.layers.{index}", config)
    yield Site("norm", SiteKind.NORM, "gpt_neox.final_layer_norm", hidden, hidden, bias=True)
    yield Site("head", SiteKind.LINEAR, "lm_head", hidden, vocab)


def _layer(name: str, path: str, config: PretrainedConfig) -> Iterator[Site]:
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    bias = bool(config.attention_bias)
    attention, feed_forward = f"{path}.attention", f"{path}.mlp"
    first, second = f"{path}.input_layernorm", f"{path}.post_attention_layernorm"
    fused, up, down = (
        f"{attention}.query_key_value",
        f"{feed_forward}.dense_h_to_4h",
        f"{feed_forward}.dense_4h_to_h",
    )

    yield Site(f"{name}.attn.norm", SiteKind.NORM, first, hidden, hidden, bias=True)
    yield Site(f"{name}.attn.qkv", SiteKind.LINEAR, fused, hidden, 3 * hidden, bias)
    yield Site(f"{name}.attn.kv", SiteKind.KV, attention, hidden, hidden)
    yield Site(f"{name}.attn.o", SiteKind.LINEAR, f"{attention}.dense", hidden, hidden, bias)
    yield Site(
        f"{name}.attn.out",
        SiteKind.BLOCK,
        f"{attention}.dense",
        hidden,
        hidden,
        residual=first,
        inner=fused,
    )
    yield Site(f"{name}.mlp.norm", SiteKind.NORM, second, hidden, hidden, bias=True)
    yield Site(f"{name}.mlp.up", SiteKind.LINEAR, up, hidden, inner, bias=True)
    yield Site(f"{name}.mlp.down", SiteKind.LINEAR, down, inner, hidden, bias=True)
    yield Site(f"{name}.mlp.out", SiteKind.BLOCK, down, hidden, hidden, residual=second, inner=up)
