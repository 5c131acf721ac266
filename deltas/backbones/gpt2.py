"""Sites of GPT-2: pre-norm, layer norms, learned positions, one fused ``Conv1D`` for query, key and value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from deltas.backbones.usual import usual_spec
from deltas.errors import UnsupportedBackbone
from deltas.sites import BackboneSpec, Site, SiteKind


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``GPT2LMHeadModel`` with this configuration.

    Raises :class:`UnsupportedBackbone` for one with cross-attention: its extra layers are in no table.
    """
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedBackbone("GPT-2 with cross-attention is not supported", field="add_cross_attention")
    spec = usual_spec(config, "gpt2", revision, _sites(config))
    return replace(spec, base_prefix="transformer", conv1d=True)


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them."""
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    positions = int(config.max_position_embeddings)
    yield Site("embed", SiteKind.EMBEDDING, "transformer.wte", vocab, hidden)
    yield Site("embed.positions", SiteKind.EMBEDDING, "transformer.wpe", positions, hidden)
    for index in range(int(config.num_hidden_layers)):
        yield from _layer(index, config)
    yield Site("norm", SiteKind.NORM, "transformer.ln_f", hidden, hidden, bias=True)
    yield Site("head", SiteKind.LINEAR, "lm_head", hidden, vocab)


def _layer(index: int, config: PretrainedConfig) -> Iterator[Site]:
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "n_inner", None) or 4 * hidden)

    name, path = f"layers.{index}", f"transformer.h.{index}"
    attention, feed_forward = f"{path}.attn", f"{path}.mlp"
    fused = f"{attention}.c_attn"

    yield Site(f"{name}.attn.norm", SiteKind.NORM, f"{path}.ln_1", hidden, hidden, bias=True)
    yield Site(f"{name}.attn.qkv", SiteKind.LINEAR, fused, hidden, 3 * hidden, bias=True)
    for place, leaf in enumerate("qkv"):
        yield Site(
            f"{name}.attn.{leaf}",
            SiteKind.LINEAR,
            fused,
            hidden,
            hidden,
            bias=True,
            offset=place * hidden,
            part=True,
        )
    yield Site(f"{name}.attn.kv", SiteKind.KV, attention, hidden, hidden)
    yield Site(f"{name}.attn.o", SiteKind.LINEAR, f"{attention}.c_proj", hidden, hidden, bias=True)
    yield Site(
        f"{name}.attn.out",
        SiteKind.BLOCK,
        f"{attention}.c_proj",
        hidden,
        hidden,
        residual=f"{path}.ln_1",
        inner=fused,
    )
    yield Site(f"{name}.mlp.norm", SiteKind.NORM, f"{path}.ln_2", hidden, hidden, bias=True)
    yield Site(f"{name}.mlp.up", SiteKind.LINEAR, f"{feed_forward}.c_fc", hidden, inner, bias=True)
    yield Site(f"{name}.mlp.down", SiteKind.LINEAR, f"{feed_forward}.c_proj", inner, hidden, bias=True)
    yield Site(
        f"{name}.mlp.out",
        SiteKind.BLOCK,
        f"{feed_forward}.c_proj",
        hidden,
        hidden,
        residual=f"{path}.ln_2",
        inner=f"{feed_forward}.c_fc",
    )
