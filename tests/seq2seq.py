"""A tiny BART and tiny T5s with a tokenizer beside them: folders that the server serves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from tests.oracle.padded import BACKBONES

WORDS = 56
SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}
BART_SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


def write_t5(folder: Path, family: str = "t5", *, untied: bool = False) -> Path:
    """``t5`` or ``t5_gated`` of the fixtures, with words ``w5`` to ``w60``, one token each, before ``</s>``."""
    shutil.copytree(BACKBONES / family, folder)
    _write_tokenizer(folder, SPECIAL, "$A </s>")
    if untied:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        torch.manual_seed(3)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.save_pretrained(folder)
    return folder


def write_bart(folder: Path, **generation: object) -> Path:
    """The fixtures' BART with the same words, between ``<s>`` and ``</s>``; ``generation`` goes into its configuration."""
    shutil.copytree(BACKBONES / "bart", folder)
    _write_tokenizer(folder, BART_SPECIAL, "<s> $A </s>")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | generation))
    return folder


def _write_tokenizer(folder: Path, special: dict[str, int], template: str) -> None:
    tokenizer = Tokenizer(models.WordLevel(special | {f"w{n}": n for n in range(5, 5 + WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(word, special[word]) for word in template.split() if word in special],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def source_of(row: int, length: int, end: int = SPECIAL["</s>"]) -> list[int]:
    """A source of so many tokens, ``</s>`` at its end, another one for each row."""
    return [5 + (row * 37 + at * 11 + at * at) % WORDS for at in range(length - 1)] + [end]
