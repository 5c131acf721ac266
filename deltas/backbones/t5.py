"""Sites of T5: encoder and decoder, pre-norm, RMS norms, relative positions, no biases, ``wi`` gated or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from transformers import PretrainedConfig

from deltas.sites import BackboneSpec, Site, SiteKind

# T5 has no position table to run out of; this is the length it was trained on, unless the configuration says another
TRAINED_POSITIONS = 512

NOT_CALLED = "T5 never calls this module: change encoder.embed and decoder.embed, which are its copies"
NOT_BY_ROW = "the relative position biases belong to the whole batch, and cannot differ by row"

Stack = Literal["encoder", "decoder"]


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``T5ForConditionalGeneration`` with this configuration; ``head_dim`` is free of hidden / heads.

    ``layers`` counts the encoder's; the decoder may have more or fewer, as its sites show.
    """
    heads = int(config.num_heads)
    return BackboneSpec(
        family="t5",
        revision=revision,
        hidden=int(config.d_model),
        layers=int(config.num_layers),
        heads=heads,
        kv_heads=heads,
        head_dim=int(config.d_kv),
        vocab=int(config.vocab_size),
        max_positions=int(getattr(config, "n_positions", None) or TRAINED_POSITIONS),
        pre_norm=True,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        sites={site.name: site for site in _sites(config)},
        kind="encoder-decoder",
        base_prefix="",
    )


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them.

    ``shared`` owns the token embedding that each stack has as a module of its own: the weights are one tensor, but
    only the stacks' modules are called.
    """
    hidden, vocab = int(config.d_model), int(config.vocab_size)
    yield Site("embed", SiteKind.EMBEDDING, "shared", vocab, hidden, refused=NOT_CALLED)
    yield from _stack("encoder", int(config.num_layers), config)
    yield from _stack("decoder", int(config.num_decoder_layers), config)
    yield Site("head", SiteKind.LINEAR, "lm_head", hidden, vocab)


def _stack(stack: Stack, layers: int, config: PretrainedConfig) -> Iterator[Site]:
    hidden, vocab = int(config.d_model), int(config.vocab_size)
    yield Site(f"{stack}.embed", SiteKind.EMBEDDING, f"{stack}.embed_tokens", vocab, hidden)
    for index in range(layers):
        name, path = f"{stack}.layers.{index}", f"{stack}.block.{index}.layer"
        # only the first layer has a table of positions; the others are handed what it gave
        positions = f"{stack}.positions" if index == 0 else None
        yield from _attention(f"{name}.attn", f"{path}.0", "SelfAttention", config, positions)
        if stack == "decoder":
            yield from _attention(f"{name}.cross", f"{path}.1", "EncDecAttention", config)
        yield from _feed_forward(f"{name}.mlp", f"{path}.{2 if stack == 'decoder' else 1}", config)
    yield Site(f"{stack}.norm", SiteKind.NORM, f"{stack}.final_layer_norm", hidden, hidden)


def _attention(
    name: str, path: str, module: str, config: PretrainedConfig, positions: str | None = None
) -> Iterator[Site]:
    """Self- or cross-attention; k and v of the latter read the encoder's output."""
    hidden, width = int(config.d_model), int(config.num_heads) * int(config.d_kv)
    attention, norm = f"{path}.{module}", f"{path}.layer_norm"
    yield Site(f"{name}.norm", SiteKind.NORM, norm, hidden, hidden)
    for leaf in "qkv":
        yield Site(f"{name}.{leaf}", SiteKind.LINEAR, f"{attention}.{leaf}", hidden, width)
    yield Site(f"{name}.kv", SiteKind.KV, attention, width, width)
    if positions is not None:
        table, buckets = f"{attention}.relative_attention_bias", int(config.relative_attention_num_buckets)
        heads = int(config.num_heads)
        yield Site(positions, SiteKind.EMBEDDING, table, buckets, heads, refused=NOT_BY_ROW)
    yield Site(f"{name}.o", SiteKind.LINEAR, f"{attention}.o", width, hidden)
    yield Site(
        f"{name}.out",
        SiteKind.BLOCK,
        f"{attention}.o",
        hidden,
        hidden,
        residual=norm,
        inner=f"{attention}.q",
    )


def _feed_forward(name: str, path: str, config: PretrainedConfig) -> Iterator[Site]:
    hidden, inner = int(config.d_model), int(config.d_ff)
    dense, norm = f"{path}.DenseReluDense", f"{path}.layer_norm"
    linears = {"gate": "wi_0", "up": "wi_1"} if config.is_gated_act else {"up": "wi"}
    yield Site(f"{name}.norm", SiteKind.NORM, norm, hidden, hidden)
    for leaf, module in linears.items():
        yield Site(f"{name}.{leaf}", SiteKind.LINEAR, f"{dense}.{module}", hidden, inner)
    yield Site(f"{name}.down", SiteKind.LINEAR, f"{dense}.wo", inner, hidden)
    yield Site(
        f"{name}.out",
        SiteKind.BLOCK,
        f"{dense}.wo",
        hidden,
        hidden,
        residual=norm,
        inner=f"{dense}.{next(iter(linears.values()))}",
    )
