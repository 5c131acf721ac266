"""The spec of a backbone whose configuration uses the usual names; tables say where theirs differs."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PretrainedConfig

from deltas.sites import BackboneSpec, Site


def usual_spec(config: PretrainedConfig, family: str, revision: str, sites: Iterable[Site]) -> BackboneSpec:
    """A pre-norm decoder with one key head for each query head, whose modules begin with ``model``."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    return BackboneSpec(
        family=family,
        revision=revision,
        hidden=hidden,
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        pre_norm=True,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        sites={site.name: site for site in sites},
    )
