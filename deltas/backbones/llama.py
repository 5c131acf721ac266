"""Sites of Llama-shaped decoders: pre-norm, RMS norms, rotary positions, gated feed-forward."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from deltas.sites import BackboneSpec, Site, SiteKind


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``LlamaForCausalLM`` with this configuration; ``head_dim`` is free of hidden / heads."""
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    head_dim = getattr(config, "head_dim", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    return BackboneSpec(
        family="llama",
        revision=revision,
        hidden=hidden,
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=heads if kv_heads is None else int(kv_heads),
        head_dim=hidden // heads if head_dim is None else int(head_dim),
        vocab=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        pre_norm=True,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        sites={site.name: site for site in _sites(config)},
    )


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them."""
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    yield Site("embed", SiteKind.EMBEDDING, "model.embed_tokens", vocab, hidden)
    for index in range(int(config.num_hidden_layers)):
        yield from _layer(index, config)
    yield Site("norm", SiteKind.NORM, "model.norm", hidden, hidden)
    yield Site("head", SiteKind.LINEAR, "lm_head", hidden, vocab)


def _layer(index: int, config: PretrainedConfig) -> Iterator[Site]:
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    queries = heads * head_dim
    keys = int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
    attn_bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False))

    name, path = f"layers.{index}", f"model.layers.{index}"
    attention, feed_forward = f"{path}.self_attn", f"{path}.mlp"

    yield Site(f"{name}.attn.norm", SiteKind.NORM, f"{path}.input_layernorm", hidden, hidden)
    yield Site(f"{name}.attn.q", SiteKind.LINEAR, f"{attention}.q_proj", hidden, queries, attn_bias)
    yield Site(f"{name}.attn.k", SiteKind.LINEAR, f"{attention}.k_proj", hidden, keys, attn_bias)
    yield Site(f"{name}.attn.v", SiteKind.LINEAR, f"{attention}.v_proj", hidden, keys, attn_bias)
    yield Site(f"{name}.attn.kv", SiteKind.KV, attention, keys, keys)
    yield Site(f"{name}.attn.o", SiteKind.LINEAR, f"{attention}.o_proj", queries, hidden, attn_bias)
    yield Site(
        f"{name}.attn.out",
        SiteKind.BLOCK,
        f"{attention}.o_proj",
        hidden,
        hidden,
        residual=f"{path}.input_layernorm",
        inner=f"{attention}.q_proj",
    )
    yield Site(f"{name}.mlp.norm", SiteKind.NORM, f"{path}.post_attention_layernorm", hidden, hidden)
    yield Site(f"{name}.mlp.gate", SiteKind.LINEAR, f"{feed_forward}.gate_proj", hidden, inner, mlp_bias)
    yield Site(f"{name}.mlp.up", SiteKind.LINEAR, f"{feed_forward}.up_proj", hidden, inner, mlp_bias)
    yield Site(f"{name}.mlp.down", SiteKind.LINEAR, f"{feed_forward}.down_proj", inner, hidden, mlp_bias)
    yield Site(
        f"{name}.mlp.out",
        SiteKind.BLOCK,
        f"{feed_forward}.down_proj",
        hidden,
        hidden,
        residual=f"{path}.post_attention_layernorm",
        inner=f"{feed_forward}.gate_proj",
    )
