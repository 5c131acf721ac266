"""Tiny random decoders of every family that has no fixture of its own, made where a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

HIDDEN, INNER, LAYERS, HEADS, VOCAB, POSITIONS, WINDOW = 32, 48, 2, 4, 61, 48, 5

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA: dict[str, Any] = {
    **_SIZES,
    "intermediate_size": INNER,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 10, "pad_token_id": 0}
_WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

CONFIGS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "gemma": lambda: GemmaConfig(**_GEMMA | {"num_key_value_heads": 1}),
    "gemma2": lambda: Gemma2Config(
        **_GEMMA,
        query_pre_attn_scalar=7,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_GEMMA,
        query_pre_attn_scalar=7,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
        },
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=INNER, initializer_range=0.3),
    "gpt_neox serial": lambda: GPTNeoXConfig(
        **_SIZES,
        intermediate_size=INNER,
        initializer_range=0.3,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "mistral": lambda: MistralConfig(**_LLAMA, head_dim=10, sliding_window=None),
    "mistral windowed": lambda: MistralConfig(**_LLAMA, sliding_window=WINDOW),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=INNER, init_std=0.3),
    "opt plain": lambda: OPTConfig(
        **_SIZES, ffn_dim=INNER, init_std=0.3, enable_bias=False, tie_word_embeddings=False
    ),
    "qwen2": lambda: Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen2 windowed": lambda: Qwen2Config(**_LLAMA, **_WINDOWED),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=10),
    "qwen3 windowed": lambda: Qwen3Config(**_LLAMA, **_WINDOWED, head_dim=10, attention_bias=True),
}
"""By family, and what is special about a second model of one."""


def family_of(name: str) -> str:
    return name.split(" ")[0]


def save(name: str, folder: Path) -> Path:
    """The model of this name in Hugging Face's layout. No parameter is left at the zero or one that it begins with."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centred = family_of(name).startswith("gemma")
            one = path.endswith("norm.weight") and not centred
            torch.nn.init.normal_(parameter, mean=1.0 if one else 0.0, std=0.3)
    target = folder / name.replace(" ", "_")
    model.save_pretrained(target)
    return target
