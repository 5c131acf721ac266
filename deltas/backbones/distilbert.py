"""Sites of DistilBERT: BERT's computation under names of its own, without token types."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from deltas.backbones.bert import encoder_spec
from deltas.sites import BackboneSpec, Site, SiteKind


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``DistilBertForMaskedLM`` with this configuration.

    Raises :class:`UnsupportedBackbone` as BERT's does.
    """
    return encoder_spec("distilbert", config, revision, int(config.max_position_embeddings), _sites(config))


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them."""
    hidden, vocab, path = int(config.dim), int(config.vocab_size), "distilbert.embeddings"
    positions = int(config.max_position_embeddings)
    yield Site("embed", SiteKind.EMBEDDING, f"{path}.word_embeddings", vocab, hidden)
    yield Site("embed.positions", SiteKind.EMBEDDING, f"{path}.position_embeddings", positions, hidden)
    yield Site("embed.norm", SiteKind.NORM, f"{path}.LayerNorm", hidden, hidden, bias=True)
    for index in range(int(config.n_layers)):
        yield from _layer(f"layers.{index}", f"distilbert.transformer.layer.{index}", config)
    yield Site("head.dense", SiteKind.LINEAR, "vocab_transform", hidden, hidden, bias=True)
    yield Site("head.norm", SiteKind.NORM, "vocab_layer_norm", hidden, hidden, bias=True)
    yield Site("head", SiteKind.LINEAR, "vocab_projector", hidden, vocab, bias=True)


def _layer(name: str, path: str, config: PretrainedConfig) -> Iterator[Site]:
    hidden, inner = int(config.dim), int(config.hidden_dim)
    attention, feed_forward = f"{path}.attention", f"{path}.ffn"
    for leaf in "qkv":
        yield Site(
            f"{name}.attn.{leaf}", SiteKind.LINEAR, f"{attention}.{leaf}_lin", hidden, hidden, bias=True
        )
    yield Site(f"{name}.attn.kv", SiteKind.KV, attention, hidden, hidden)
    yield Site(f"{name}.attn.o", SiteKind.LINEAR, f"{attention}.out_lin", hidden, hidden, bias=True)
    yield Site(
        f"{name}.attn.out",
        SiteKind.BLOCK,
        f"{attention}.out_lin",
        hidden,
        hidden,
        residual=f"{attention}.q_lin",
        norm=f"{path}.sa_layer_norm",
        inner=f"{attention}.q_lin",
    )
    yield Site(f"{name}.attn.norm", SiteKind.NORM, f"{path}.sa_layer_norm", hidden, hidden, bias=True)
    yield Site(f"{name}.mlp.up", SiteKind.LINEAR, f"{feed_forward}.lin1", hidden, inner, bias=True)
    yield Site(f"{name}.mlp.down", SiteKind.LINEAR, f"{feed_forward}.lin2", inner, hidden, bias=True)
    yield Site(
        f"{name}.mlp.out",
        SiteKind.BLOCK,
        f"{feed_forward}.lin2",
        hidden,
        hidden,
        residual=f"{feed_forward}.lin1",
        norm=f"{path}.output_layer_norm",
        inner=f"{feed_forward}.lin1",
    )
    yield Site(f"{name}.mlp.norm", SiteKind.NORM, f"{path}.output_layer_norm", hidden, hidden, bias=True)
