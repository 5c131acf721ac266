"""Backbones: one small table of sites per architecture family, made from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from deltas.backbones import (
    bart,
    bert,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    modernbert,
    opt,
    qwen2,
    qwen3,
    roberta,
    t5,
)
from deltas.errors import UnsupportedBackbone
from deltas.sites import BackboneSpec

_TABLES: dict[str, Callable[[PretrainedConfig, str], BackboneSpec]] = {
    "bart": bart.describe,
    "bert": bert.describe,
    "distilbert": distilbert.describe,
    "gemma": gemma.describe,
    "gemma2": gemma.describe_second,
    "gemma3_text": gemma.describe_third,
    "gpt2": gpt2.describe,
    "gpt_neox": gpt_neox.describe,
    "llama": llama.describe,
    "mistral": mistral.describe,
    "modernbert": modernbert.describe,
    "opt": opt.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
    "roberta": roberta.describe,
    "t5": t5.describe,
}


def families() -> list[str]:
    """The ``model_type`` values that have a table, sorted."""
    return sorted(_TABLES)


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """What the library must know of a backbone; no weights are needed.

    ``revision`` identifies the weights. Raises :class:`UnsupportedBackbone`, listing the families there are.
    """
    family = str(getattr(config, "model_type", ""))
    table = _TABLES.get(family)
    if table is None:
        raise UnsupportedBackbone(
            f"backbones of model_type {family!r} are not supported; supported: {', '.join(families())}",
            field="model_type",
        )
    return table(config, revision)
