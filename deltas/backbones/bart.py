"""Sites of BART: encoder and decoder, post-norm, learned positions behind two unused rows, biases, a tied head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from transformers import PretrainedConfig

from deltas.errors import UnsupportedBackbone
from deltas.sites import BackboneSpec, Site, SiteKind

UNUSED_POSITIONS = 2  # the table of positions begins with so many rows that are no token's
NOT_CALLED = "BART never calls this module: change encoder.embed and decoder.embed, which are its copies"
NOT_BY_ROW = "BART's decoder looks positions up once for the whole batch: they cannot differ by row"

Stack = Literal["encoder", "decoder"]


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``BartForConditionalGeneration`` with this configuration.

    ``layers`` counts the encoder's; the decoder may have more or fewer, as its sites show. Raises
    :class:`UnsupportedBackbone` where the decoder's heads are not as many as the encoder's.
    """
    heads = int(config.encoder_attention_heads)
    if int(config.decoder_attention_heads) != heads:
        raise UnsupportedBackbone(
            f"decoder_attention_heads is {config.decoder_attention_heads}, encoder_attention_heads {heads}: supported "
            "is one number for both",
            field="decoder_attention_heads",
        )
    return BackboneSpec(
        family="bart",
        revision=revision,
        hidden=int(config.d_model),
        layers=int(config.encoder_layers),
        heads=heads,
        kv_heads=heads,
        head_dim=int(config.d_model) // heads,
        vocab=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        pre_norm=False,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        sites={site.name: site for site in _sites(config)},
        kind="encoder-decoder",
        keys_first=True,
    )


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them.

    ``shared`` owns the token embedding that each stack has as a module of its own: the weights are one tensor, but
    only the stacks' modules are called. ``final_logits_bias``, which is added to the logits, is of no module.
    """
    hidden, vocab = int(config.d_model), int(config.vocab_size)
    yield Site("embed", SiteKind.EMBEDDING, "model.shared", vocab, hidden, refused=NOT_CALLED)
    yield from _stack("encoder", int(config.encoder_layers), int(config.encoder_ffn_dim), config)
    yield from _stack("decoder", int(config.decoder_layers), int(config.decoder_ffn_dim), config)
    yield Site("head", SiteKind.LINEAR, "lm_head", hidden, vocab)


def _stack(stack: Stack, layers: int, inner: int, config: PretrainedConfig) -> Iterator[Site]:
    hidden, vocab, path = int(config.d_model), int(config.vocab_size), f"model.{stack}"
    scale = math.sqrt(hidden) if config.scale_embedding else 1.0
    rows = int(config.max_position_embeddings) + UNUSED_POSITIONS
    refused = NOT_BY_ROW if stack == "decoder" else ""
    yield Site(f"{stack}.embed", SiteKind.EMBEDDING, f"{path}.embed_tokens", vocab, hidden, scale=scale)
    yield Site(
        f"{stack}.embed.positions",
        SiteKind.EMBEDDING,
        f"{path}.embed_positions",
        rows,
        hidden,
        refused=refused,
    )
    yield Site(f"{stack}.embed.norm", SiteKind.NORM, f"{path}.layernorm_embedding", hidden, hidden, bias=True)
    for index in range(layers):
        name, layer = f"{stack}.layers.{index}", f"{path}.layers.{index}"
        yield from _attention(f"{name}.attn", f"{layer}.self_attn", hidden)
        if stack == "decoder":
            yield from _attention(f"{name}.cross", f"{layer}.encoder_attn", hidden)
        yield from _feed_forward(f"{name}.mlp", layer, hidden, inner)


def _attention(name: str, path: str, hidden: int) -> Iterator[Site]:
    """Self- or cross-attention; k and v of the latter read the encoder's output."""
    norm = f"{path}_layer_norm"
    for leaf in "qkv":
        yield Site(f"{name}.{leaf}", SiteKind.LINEAR, f"{path}.{leaf}_proj", hidden, hidden, bias=True)
    yield Site(f"{name}.kv", SiteKind.KV, path, hidden, hidden)
    yield Site(f"{name}.o", SiteKind.LINEAR, f"{path}.out_proj", hidden, hidden, bias=True)
    yield from _end(name, f"{path}.out_proj", f"{path}.q_proj", norm, hidden)


def _feed_forward(name: str, path: str, hidden: int, inner: int) -> Iterator[Site]:
    yield Site(f"{name}.up", SiteKind.LINEAR, f"{path}.fc1", hidden, inner, bias=True)
    yield Site(f"{name}.down", SiteKind.LINEAR, f"{path}.fc2", inner, hidden, bias=True)
    yield from _end(name, f"{path}.fc2", f"{path}.fc1", f"{path}.final_layer_norm", hidden)


def _end(name: str, last: str, first: str, norm: str, hidden: int) -> Iterator[Site]:
    """A sublayer's output, and the norm of its sum with what the sublayer's first linear was given."""
    yield Site(f"{name}.out", SiteKind.BLOCK, last, hidden, hidden, residual=first, norm=norm, inner=first)
    yield Site(f"{name}.norm", SiteKind.NORM, norm, hidden, hidden, bias=True)
