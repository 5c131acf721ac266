"""What the tests of rows from 3 to 500 tokens share: lengths, tiny backbones with positions for them, prompts.

Backbones whose attention sees a window see one that is shorter than most rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
)

from tests.oracle.peft_reference import PROMPT_SIZES
from tests.unit.backbones import tiny

LENGTHS = (3, 17, 64, 128, 257, 500)
POSITIONS, WINDOW = 600, 100
INITIAL = 0.2  # standard deviation of weights: deltas matter, and attention does not turn roundings into differences
_NORM = re.compile(r"(norm|ln_\w+)\.weight$", re.IGNORECASE)


def _longer(make: Callable[[], PretrainedConfig]) -> Callable[[], PretrainedConfig]:
    def config() -> PretrainedConfig:
        found = make()
        found.max_position_embeddings, found.initializer_range = POSITIONS, INITIAL
        if getattr(found, "sliding_window", None) is not None:
            found.sliding_window = WINDOW
        return found

    return config


_SIZES: dict[str, Any] = {
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": tiny.HEADS,
    "vocab_size": tiny.VOCAB,
    "max_position_embeddings": POSITIONS,
    "initializer_range": INITIAL,
}
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}

DECODERS: Mapping[str, Callable[[], PretrainedConfig]] = {
    **{name: _longer(make) for name, make in tiny.CONFIGS.items()},
    "gpt2": lambda: GPT2Config(**_SIZES, **_SPECIAL, n_inner=tiny.INNER),
    "llama": lambda: LlamaConfig(**_SIZES, intermediate_size=tiny.INNER, num_key_value_heads=2),
}
"""By family, and what is special about a second model of one; those of ``tiny`` are here by themselves."""


@dataclass(frozen=True)
class Encoder:
    """A configuration, and what PEFT must be told of its model (``peft_reference.FAMILIES`` has the names of its parts).

    ``head``: by task, the modules of the head that are saved only if they are named. ``prompt``: options of prompt
    configs that PEFT does not find in the configuration. ``prefix``: whether the model takes PEFT's prefixes.
    """

    config: Callable[[], PretrainedConfig]
    head: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompt: Mapping[str, Any] = field(default_factory=dict)
    prefix: bool = True


ENCODERS: Mapping[str, Encoder] = {
    "bert": Encoder(
        lambda: BertConfig(**_SIZES, intermediate_size=tiny.INNER), head={"SEQ_CLS": ("pooler",)}
    ),
    "distilbert": Encoder(
        lambda: DistilBertConfig(
            vocab_size=tiny.VOCAB,
            dim=tiny.HIDDEN,
            hidden_dim=tiny.INNER,
            n_layers=tiny.LAYERS,
            n_heads=tiny.HEADS,
            max_position_embeddings=POSITIONS,
            initializer_range=INITIAL,
        ),
        prompt=PROMPT_SIZES["distilbert"],
        prefix=False,
    ),
    "modernbert": Encoder(
        lambda: ModernBertConfig(
            **_SIZES | {"num_hidden_layers": 4},
            **_SPECIAL,
            intermediate_size=tiny.INNER,
            local_attention=WINDOW,
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
        ),
        head={"SEQ_CLS": ("head",), "TOKEN_CLS": ("head",)},
        prefix=False,
    ),
    "roberta": Encoder(
        lambda: RobertaConfig(**_SIZES, **_SPECIAL, intermediate_size=tiny.INNER, pad_token_id=3)
    ),
}
"""By family."""


def _t5(feed_forward: str) -> PretrainedConfig:
    return T5Config(
        vocab_size=tiny.VOCAB,
        d_model=tiny.HIDDEN,
        d_kv=8,
        d_ff=tiny.INNER,
        num_layers=tiny.LAYERS,
        num_heads=tiny.HEADS,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=feed_forward == "relu",
    )


def _bart() -> PretrainedConfig:
    return BartConfig(
        vocab_size=tiny.VOCAB,
        d_model=tiny.HIDDEN,
        encoder_layers=tiny.LAYERS,
        decoder_layers=tiny.LAYERS,
        encoder_attention_heads=tiny.HEADS,
        decoder_attention_heads=tiny.HEADS,
        encoder_ffn_dim=tiny.INNER,
        decoder_ffn_dim=tiny.INNER,
        max_position_embeddings=POSITIONS,
        init_std=INITIAL,
    )


ENCODER_DECODERS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "bart": _bart,
    "t5": lambda: _t5("relu"),
    "t5 gated": lambda: _t5("gated-gelu"),
}
"""As the decoders'."""


def write(config: PretrainedConfig, kind: Any, folder: Path) -> Path:
    """A random model of this configuration; nothing is left at the zero or one that it begins with.

    ``kind``: the ``AutoModelFor...`` that makes it. It knows no last token: a row is as long as it is asked to be.
    """
    torch.manual_seed(5)
    config.eos_token_id = None
    model = kind.from_config(config)
    centred = config.model_type.startswith("gemma")
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            one = _NORM.search(path) and not centred
            nn.init.normal_(parameter, mean=1.0 if one else 0.0, std=0.3)
    model.save_pretrained(folder)
    return folder


def text(length: int, seed: int = 0) -> list[int]:
    """Token ids that are no special ones."""
    make = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(5, tiny.VOCAB, (length,), generator=make).tolist()


def spread(names: Iterable[str]) -> list[tuple[str, int]]:
    """Each name with a short length and a long one, ``(name, length)``; neighbours have other names and lengths."""
    listed, half = list(names), len(LENGTHS) // 2
    return [
        (name, LENGTHS[(index + shift) % len(LENGTHS)])
        for shift in (0, half)
        for index, name in enumerate(listed)
    ]
