"""The tiny encoders of the oracle tests with a tokenizer, as folders that the server takes."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.oracle.padded import BACKBONES

WORDS = 56
SPECIAL = {"[PAD]": 0, "[UNK]": 2, "[CLS]": 3, "[SEP]": 4}


def write_encoder(folder: Path, family: str) -> Path:
    """An encoder of the fixtures, with words ``w5`` to ``w60``, one token each, between [CLS] and [SEP]."""
    shutil.copytree(BACKBONES / family, folder)
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | {f"w{n}": n for n in range(5, 5 + WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", SPECIAL["[CLS]"]), ("[SEP]", SPECIAL["[SEP]"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return folder
