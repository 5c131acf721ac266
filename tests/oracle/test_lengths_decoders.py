"""Rows of 3 to 500 tokens with deltas of every kind, mixed in one batch of every decoder: as PEFT alone generates.

The engine takes prompts in chunks that are shorter than most rows, then decodes; PEFT's ``generate`` takes a row at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltas.bank import PackedDelta
from deltas.formats import read
from deltas.weights import FrozenTensors
from server.engine.backbone import SERVED
from tests.oracle import lengths
from tests.oracle.peft_reference import quiet
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.oracle.test_peft_decoders import saved, stock, upload

TOLERANCE = 1e-5
MATTERS = 0.01
STEPS = 5
CHUNK = 90
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def configs() -> Mapping[str, PeftConfig]:
    return {
        "lora": peft.LoraConfig(r=3, lora_alpha=5, **TASK),
        "lora everywhere": peft.LoraConfig(
            r=17, lora_alpha=4, target_modules="all-linear", bias="all", **TASK
        ),
        "dora": peft.LoraConfig(r=5, lora_alpha=7, use_dora=True, **TASK),
        "ia3": peft.IA3Config(**TASK),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=11, **TASK),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
    }


@torch.no_grad()
def generated(model: Any, prompt: list[int]) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens by the library's own ``generate``, and the logits ``[vocab]`` of each."""
    ids = torch.tensor([prompt])
    with quiet():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, -STEPS:].tolist(), [logits[0].float() for logits in out.logits]


@torch.no_grad()
def next_logits(model: Any, prompt: list[int]) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    return found


@pytest.mark.parametrize("name", sorted(lengths.DECODERS))
def test_every_length_and_kind_in_one_batch(name: str, tmp_path: Path) -> None:
    folder = lengths.write(lengths.DECODERS[name](), AutoModelForCausalLM, tmp_path / "backbone")
    runner = make_runner(folder, torch.float32, capacity=lengths.POSITIONS)
    spec, frozen = runner.backbone.spec, FrozenTensors(folder)
    own = stock(folder)
    models: dict[str, Any] = {"base": own}
    placed: dict[str, PackedDelta] = {}
    for seed, (case, config) in enumerate(configs().items()):
        models[case] = saved(tmp_path / case, config, folder, seed)
        placed[case] = place(runner, read(upload(tmp_path / case), spec, frozen))
    rows = [
        Row(lengths.text(length, seed), placed.get(case), case)
        for seed, (case, length) in enumerate(lengths.spread(models))
    ]
    generate(runner, rows, STEPS, chunk=CHUNK)
    moved = dict.fromkeys(placed, 0.0)
    for row in rows:
        tokens, logits = generated(models[row.name], row.prompt)
        for step, wanted in enumerate(logits):
            assert same(row.logits[step], wanted) < TOLERANCE, (row.name, len(row.prompt), step)
        assert row.tokens == tokens, (row.name, len(row.prompt))
        if row.name in moved:
            moved[row.name] = max(moved[row.name], same(next_logits(own, row.prompt), logits[0]))
    assert min(moved.values()) > MATTERS, moved


def test_every_served_family_has_such_a_test() -> None:
    makers = [*lengths.DECODERS.values(), *lengths.ENCODER_DECODERS.values()]
    assert {make().model_type for make in makers} | lengths.ENCODERS.keys() == set(SERVED)
