"""Sites of BERT: an encoder, post-norm (the norm is applied to the sum of sublayer and residual), learned positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from deltas.backbones.usual import usual_spec
from deltas.errors import UnsupportedBackbone
from deltas.sites import BackboneSpec, Site, SiteKind


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``BertForMaskedLM`` with this configuration.

    Raises :class:`UnsupportedBackbone` for BERT as a decoder, or with relative positions.
    """
    positions = int(config.max_position_embeddings)
    return encoder_spec("bert", config, revision, positions, [*body("bert", config), *_head(config)])


def encoder_spec(
    family: str, config: PretrainedConfig, revision: str, max_positions: int, sites: Iterable[Site]
) -> BackboneSpec:
    """The spec of a BERT-shaped encoder whose module paths begin with the family's name.

    Raises :class:`UnsupportedBackbone` as :func:`describe` does.
    """
    for option in ("is_decoder", "add_cross_attention"):
        if getattr(config, option, False):
            raise UnsupportedBackbone(
                f"{family} is supported as an encoder only: {option} is set", field=option
            )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        # transformers 5 no longer has the others and would silently compute with absolute ones
        raise UnsupportedBackbone(
            f"position_embedding_type {positions!r} is not supported; supported: absolute",
            field="position_embedding_type",
        )
    spec = usual_spec(config, family, revision, sites)
    return replace(spec, max_positions=max_positions, pre_norm=False, kind="encoder", base_prefix=family)


def body(base: str, config: PretrainedConfig) -> Iterator[Site]:
    """Embeddings and layers under the module ``base``, in the order in which a forward pass meets them."""
    hidden = int(config.hidden_size)
    path = f"{base}.embeddings"
    tables = {
        "embed": ("word_embeddings", int(config.vocab_size)),
        "embed.types": ("token_type_embeddings", int(config.type_vocab_size)),
        "embed.positions": ("position_embeddings", int(config.max_position_embeddings)),
    }
    for name, (module, rows) in tables.items():
        yield Site(name, SiteKind.EMBEDDING, f"{path}.{module}", rows, hidden)
    yield Site("embed.norm", SiteKind.NORM, f"{path}.LayerNorm", hidden, hidden, bias=True)
    for index in range(int(config.num_hidden_layers)):
        yield from _layer(f"layers.{index}", f"{base}.encoder.layer.{index}", config)


def _layer(name: str, path: str, config: PretrainedConfig) -> Iterator[Site]:
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    attention, after = f"{path}.attention.self", f"{path}.attention.output"
    up, output = f"{path}.intermediate.dense", f"{path}.output"

    for leaf, module in (("q", "query"), ("k", "key"), ("v", "value")):
        yield Site(f"{name}.attn.{leaf}", SiteKind.LINEAR, f"{attention}.{module}", hidden, hidden, bias=True)
    yield Site(f"{name}.attn.kv", SiteKind.KV, attention, hidden, hidden)
    yield Site(f"{name}.attn.o", SiteKind.LINEAR, f"{after}.dense", hidden, hidden, bias=True)
    yield Site(
        f"{name}.attn.out",
        SiteKind.BLOCK,
        f"{after}.dense",
        hidden,
        hidden,
        residual=f"{attention}.query",
        norm=f"{after}.LayerNorm",
        inner=f"{attention}.query",
    )
    yield Site(f"{name}.attn.norm", SiteKind.NORM, f"{after}.LayerNorm", hidden, hidden, bias=True)
    yield Site(f"{name}.mlp.up", SiteKind.LINEAR, up, hidden, inner, bias=True)
    yield Site(f"{name}.mlp.down", SiteKind.LINEAR, f"{output}.dense", inner, hidden, bias=True)
    yield Site(
        f"{name}.mlp.out",
        SiteKind.BLOCK,
        f"{output}.dense",
        hidden,
        hidden,
        residual=up,
        norm=f"{output}.LayerNorm",
        inner=up,
    )
    yield Site(f"{name}.mlp.norm", SiteKind.NORM, f"{output}.LayerNorm", hidden, hidden, bias=True)


def _head(config: PretrainedConfig) -> Iterator[Site]:
    hidden, path = int(config.hidden_size), "cls.predictions"
    yield Site("head.dense", SiteKind.LINEAR, f"{path}.transform.dense", hidden, hidden, bias=True)
    yield Site("head.norm", SiteKind.NORM, f"{path}.transform.LayerNorm", hidden, hidden, bias=True)
    yield Site("head", SiteKind.LINEAR, f"{path}.decoder", hidden, int(config.vocab_size), bias=True)
