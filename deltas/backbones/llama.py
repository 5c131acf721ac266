"""Sites of Llama-shaped decoders: pre-norm, RMS norms, rotary positions, gated feed-forward.

Mistral, Qwen and Gemma are Llamas but for a few choices, which :class:`Layout` holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from deltas.backbones.rotary import check_positions
from deltas.sites import BackboneSpec, Site, SiteKind


@dataclass(frozen=True, slots=True)
class Layout:
    """What is not the same in every family of this shape."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    heads_axis: int = 0  # of norms of each head's queries and keys (see Site); 0 where there are none
    norms_by_linear: bool = False  # the queries' norm runs before the keys are made
    outer_norms: bool = False  # a norm behind each sublayer too, before its residual is added
    scale: float = 1.0  # of the token embedding


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``LlamaForCausalLM`` with this configuration; ``head_dim`` is free of hidden / heads.

    Raises :class:`UnsupportedBackbone` as :func:`check_positions` does.
    """
    attention = bool(getattr(config, "attention_bias", False))
    feed_forward = bool(getattr(config, "mlp_bias", False))
    layout = Layout(qkv_bias=attention, o_bias=attention, mlp_bias=feed_forward)
    return decoder_spec("llama", config, revision, layout)


def decoder_spec(family: str, config: PretrainedConfig, revision: str, layout: Layout) -> BackboneSpec:
    """The spec of a decoder of this shape. Raises as :func:`describe` does."""
    check_positions(config)
    heads, kv_heads, head_dim = _heads(config)
    return BackboneSpec(
        family=family,
        revision=revision,
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        pre_norm=True,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        sites={site.name: site for site in _sites(config, layout)},
    )


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key heads, the width of each."""
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None)
    return (
        heads,
        heads if kv_heads is None else int(kv_heads),
        int(config.hidden_size) // heads if head_dim is None else int(head_dim),
    )


def _sites(config: PretrainedConfig, layout: Layout) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them."""
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    yield Site("embed", SiteKind.EMBEDDING, "model.embed_tokens", vocab, hidden, scale=layout.scale)
    for index in range(int(config.num_hidden_layers)):
        name, path = f"layers.{index}", f"model.layers.{index}"
        yield from _attention(name, path, config, layout)
        yield from _feed_forward(name, path, config, layout)
    yield Site("norm", SiteKind.NORM, "model.norm", hidden, hidden)
    yield Site("head", SiteKind.LINEAR, "lm_head", hidden, vocab)


def _attention(name: str, path: str, config: PretrainedConfig, layout: Layout) -> Iterator[Site]:
    hidden = int(config.hidden_size)
    heads, kv_heads, head_dim = _heads(config)
    queries, keys, module = heads * head_dim, kv_heads * head_dim, f"{path}.self_attn"
    bias = layout.qkv_bias
    q, k, v = (
        Site(f"{name}.attn.{leaf}", SiteKind.LINEAR, f"{module}.{leaf}_proj", hidden, width, bias)
        for leaf, width in (("q", queries), ("k", keys), ("v", keys))
    )
    yield Site(f"{name}.attn.norm", SiteKind.NORM, f"{path}.input_layernorm", hidden, hidden)
    if layout.heads_axis:
        q_norm, k_norm = (
            Site(
                f"{name}.attn.{leaf}_norm",
                SiteKind.NORM,
                f"{module}.{leaf}_norm",
                head_dim,
                head_dim,
                heads_axis=layout.heads_axis,
            )
            for leaf in "qk"
        )
        yield from (q, q_norm, k, k_norm, v) if layout.norms_by_linear else (q, k, v, q_norm, k_norm)
    else:
        yield from (q, k, v)
    yield Site(f"{name}.attn.kv", SiteKind.KV, module, keys, keys)
    yield Site(f"{name}.attn.o", SiteKind.LINEAR, f"{module}.o_proj", queries, hidden, layout.o_bias)
    outer = f"{path}.post_attention_layernorm" if layout.outer_norms else ""
    yield from _ends(
        f"{name}.attn", f"{module}.o_proj", outer, hidden, f"{path}.input_layernorm", f"{module}.q_proj"
    )


def _feed_forward(name: str, path: str, config: PretrainedConfig, layout: Layout) -> Iterator[Site]:
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    module, bias = f"{path}.mlp", layout.mlp_bias
    norm = f"{path}.pre_feedforward_layernorm" if layout.outer_norms else f"{path}.post_attention_layernorm"
    yield Site(f"{name}.mlp.norm", SiteKind.NORM, norm, hidden, hidden)
    yield Site(f"{name}.mlp.gate", SiteKind.LINEAR, f"{module}.gate_proj", hidden, inner, bias)
    yield Site(f"{name}.mlp.up", SiteKind.LINEAR, f"{module}.up_proj", hidden, inner, bias)
    yield Site(f"{name}.mlp.down", SiteKind.LINEAR, f"{module}.down_proj", inner, hidden, bias)
    outer = f"{path}.post_feedforward_layernorm" if layout.outer_norms else ""
    yield from _ends(f"{name}.mlp", f"{module}.down_proj", outer, hidden, norm, f"{module}.gate_proj")


def _ends(stem: str, linear: str, outer: str, hidden: int, residual: str, inner: str) -> Iterator[Site]:
    """The sublayer's output, behind its own norm where it has one."""
    if outer:
        yield Site(f"{stem}.outer_norm", SiteKind.NORM, outer, hidden, hidden)
    yield Site(
        f"{stem}.out",
        SiteKind.BLOCK,
        outer or linear,
        hidden,
        hidden,
        residual=residual,
        inner=inner,
    )
