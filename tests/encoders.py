"""The tiny encoders of the oracle tests with a tokenizer, as folders that the server takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.oracle.padded import BACKBONES

WORDS = 56
SPECIAL = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, "[CLS]": 3, "[SEP]": 4}


def write_encoder(folder: Path, family: str) -> Path:
    """An encoder of the fixtures, with words ``w5`` to ``w60``, one token each, between [CLS] and [SEP]."""
    shutil.copytree(BACKBONES / family, folder)
    return add_tokenizer(folder)


def add_tokenizer(folder: Path) -> Path:
    """The same words for any folder's model that has 61 tokens. Pairs have types where the model has them."""
    kinds = json.loads((folder / "config.json").read_text()).get("type_vocab_size", 1)
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | {f"w{n}": n for n in range(5, 5 + WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL["[CLS]"]), ("[SEP]", SPECIAL["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if kinds > 1 else [])],
    ).save_pretrained(folder)
    return folder
