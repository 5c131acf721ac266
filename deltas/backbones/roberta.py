"""Sites of RoBERTa: BERT's layers under another name, with a head and a count of positions of its own."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from deltas.backbones import bert
from deltas.sites import BackboneSpec, Site, SiteKind


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``RobertaForMaskedLM`` with this configuration.

    ``max_positions`` is what a text may have: positions begin after the padding token's id, so that many rows and one
    more of the position table are never a token's. Raises :class:`UnsupportedBackbone` as BERT's does.
    """
    positions = int(config.max_position_embeddings) - int(config.pad_token_id) - 1
    sites = [*bert.body("roberta", config), *_head(config)]
    return bert.encoder_spec("roberta", config, revision, positions, sites)


def _head(config: PretrainedConfig) -> Iterator[Site]:
    hidden = int(config.hidden_size)
    yield Site("head.dense", SiteKind.LINEAR, "lm_head.dense", hidden, hidden, bias=True)
    yield Site("head.norm", SiteKind.NORM, "lm_head.layer_norm", hidden, hidden, bias=True)
    yield Site("head", SiteKind.LINEAR, "lm_head.decoder", hidden, int(config.vocab_size), bias=True)
