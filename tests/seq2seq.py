"""Tiny T5s with a tokenizer beside them: folders that the server serves."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from tests.oracle.padded import BACKBONES

WORDS = 56
SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}


def write_t5(folder: Path, family: str = "t5", *, untied: bool = False) -> Path:
    """``t5`` or ``t5_gated`` of the fixtures, with words ``w5`` to ``w60``, one token each, before ``</s>``."""
    shutil.copytree(BACKBONES / family, folder)
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | {f"w{n}": n for n in range(5, 5 + WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL["</s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    if untied:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        torch.manual_seed(3)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.save_pretrained(folder)
    return folder


def source_of(row: int, length: int) -> list[int]:
    """A source of so many tokens, ``</s>`` at its end, another one for each row."""
    return [5 + (row * 37 + at * 11 + at * at) % WORDS for at in range(length - 1)] + [SPECIAL["</s>"]]
