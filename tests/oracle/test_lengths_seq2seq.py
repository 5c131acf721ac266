"""Sources of 3 to 500 tokens with deltas of every kind, in one batch of every encoder-decoder: as PEFT gives them alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig
from transformers import AutoModelForSeq2SeqLM

from deltas.bank import PackedDelta
from deltas.formats import read
from deltas.weights import FrozenTensors
from tests.oracle import lengths
from tests.oracle.padded import PaddedRow
from tests.oracle.peft_reference import Row, logits
from tests.oracle.rows import same
from tests.oracle.seq2seq_rows import make_runner, place, score
from tests.oracle.test_peft_decoders import saved, stock, upload

TOLERANCE = 1e-5
MATTERS = 0.01
ANSWERS = (1, 9, 4, 17, 2)  # decoder tokens
TASK: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM"}


def configs(name: str) -> Mapping[str, PeftConfig]:
    value_and_output = ["v_proj", "out_proj"] if name == "bart" else ["v", "o"]
    return {
        "lora": peft.LoraConfig(r=3, lora_alpha=2, **TASK),
        "lora everywhere": peft.LoraConfig(r=17, lora_alpha=4, target_modules="all-linear", **TASK),
        "dora": peft.LoraConfig(r=5, lora_alpha=3, target_modules=value_and_output, use_dora=True, **TASK),
        "ia3": peft.IA3Config(**TASK),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=11, **TASK),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
    }


@pytest.mark.parametrize("name", sorted(lengths.ENCODER_DECODERS))
def test_every_length_and_kind_in_one_batch(name: str, tmp_path: Path) -> None:
    folder = lengths.write(lengths.ENCODER_DECODERS[name](), AutoModelForSeq2SeqLM, tmp_path / "backbone")
    runner = make_runner(folder)
    spec, frozen = runner.backbone.spec, FrozenTensors(folder)
    own = stock(folder, AutoModelForSeq2SeqLM)
    models: dict[str, Any] = {"base": own}
    placed: dict[str, PackedDelta] = {}
    for seed, (case, config) in enumerate(configs(name).items()):
        models[case] = saved(tmp_path / case, config, folder, seed, AutoModelForSeq2SeqLM)
        placed[case] = place(runner, read(upload(tmp_path / case), spec, frozen))
    rows = [
        PaddedRow(
            lengths.text(length, seed),
            placed.get(case),
            [0, *lengths.text(ANSWERS[seed % len(ANSWERS)], seed)],
            case,
        )
        for seed, (case, length) in enumerate(lengths.spread(models))
    ]
    moved = dict.fromkeys(placed, 0.0)
    for row, got in zip(rows, score(runner, rows), strict=True):
        given = Row(tuple(row.ids), tuple(row.decoder_ids or ()))
        wanted = logits(models[row.name], given)
        assert same(got, wanted) < TOLERANCE, (row.name, len(row.ids))
        if row.name in moved:
            moved[row.name] = max(moved[row.name], same(logits(own, given), wanted))
    assert min(moved.values()) > MATTERS, moved
