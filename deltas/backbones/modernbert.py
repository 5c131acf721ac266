"""Sites of ModernBERT: an encoder, pre-norm, rotary positions, windows in most layers, fused linears, few biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from deltas.backbones.rotary import check_positions
from deltas.backbones.usual import usual_spec
from deltas.sites import BackboneSpec, Site, SiteKind, TaskHead

NO_PREFIX = "no library has prefixes for ModernBERT, and what a layer's window would see of one is not agreed; use a prompt"


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``ModernBertForMaskedLM`` with this configuration.

    Raises :class:`UnsupportedBackbone` as :func:`check_positions` does.
    """
    check_positions(config)
    head = TaskHead(
        pooling="mean" if config.classifier_pooling == "mean" else "first",
        activation=str(config.classifier_activation),
        norm_eps=float(config.norm_eps),
    )
    return replace(usual_spec(config, "modernbert", revision, _sites(config)), kind="encoder", task_head=head)


def _sites(config: PretrainedConfig) -> Iterator[Site]:
    """Every site, in the order in which a forward pass meets them."""
    hidden, vocab, bias = int(config.hidden_size), int(config.vocab_size), bool(config.norm_bias)
    yield Site("embed", SiteKind.EMBEDDING, "model.embeddings.tok_embeddings", vocab, hidden)
    yield Site("embed.norm", SiteKind.NORM, "model.embeddings.norm", hidden, hidden, bias)
    for index in range(int(config.num_hidden_layers)):
        yield from _attention(index, config)
        yield from _feed_forward(index, config)
    yield Site("norm", SiteKind.NORM, "model.final_norm", hidden, hidden, bias)
    yield Site("head.dense", SiteKind.LINEAR, "head.dense", hidden, hidden, bool(config.classifier_bias))
    yield Site("head.norm", SiteKind.NORM, "head.norm", hidden, hidden, bias)
    yield Site("head", SiteKind.LINEAR, "decoder", hidden, vocab, bool(config.decoder_bias))


def _attention(index: int, config: PretrainedConfig) -> Iterator[Site]:
    """The first layer has no norm of its own: what it reads was normed by the embeddings."""
    name, path = f"layers.{index}.attn", f"model.layers.{index}"
    hidden, bias, fused = int(config.hidden_size), bool(config.attention_bias), f"{path}.attn.Wqkv"
    norm = f"{path}.attn_norm"
    if index:
        yield Site(f"{name}.norm", SiteKind.NORM, norm, hidden, hidden, bool(config.norm_bias))
    yield from _fused(f"{name}.qkv", [f"{name}.{leaf}" for leaf in "qkv"], fused, hidden, hidden, bias)
    yield Site(f"{name}.kv", SiteKind.KV, f"{path}.attn", hidden, hidden, refused=NO_PREFIX)
    yield Site(f"{name}.o", SiteKind.LINEAR, f"{path}.attn.Wo", hidden, hidden, bias)
    yield Site(
        f"{name}.out",
        SiteKind.BLOCK,
        f"{path}.attn.Wo",
        hidden,
        hidden,
        residual=norm if index else fused,
        inner=fused,
    )


def _feed_forward(index: int, config: PretrainedConfig) -> Iterator[Site]:
    """``Wi`` gives what goes through the activation, then what that is multiplied by: gate and up."""
    name, path = f"layers.{index}.mlp", f"model.layers.{index}"
    hidden, inner, bias = int(config.hidden_size), int(config.intermediate_size), bool(config.mlp_bias)
    norm, fused = f"{path}.mlp_norm", f"{path}.mlp.Wi"
    yield Site(f"{name}.norm", SiteKind.NORM, norm, hidden, hidden, bool(config.norm_bias))
    yield from _fused(f"{name}.gate_up", [f"{name}.gate", f"{name}.up"], fused, hidden, inner, bias)
    yield Site(f"{name}.down", SiteKind.LINEAR, f"{path}.mlp.Wo", inner, hidden, bias)
    yield Site(f"{name}.out", SiteKind.BLOCK, f"{path}.mlp.Wo", hidden, hidden, residual=norm, inner=fused)


def _fused(name: str, parts: list[str], path: str, given: int, width: int, bias: bool) -> Iterator[Site]:
    """A linear, and its parts of ``width`` columns each."""
    yield Site(name, SiteKind.LINEAR, path, given, len(parts) * width, bias)
    for place, part in enumerate(parts):
        yield Site(part, SiteKind.LINEAR, path, given, width, bias, offset=place * width, part=True)
