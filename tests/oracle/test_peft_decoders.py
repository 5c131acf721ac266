"""PEFT's deltas on the decoders that have no fixture: read from PEFT's own files and served in one batch, they give PEFT's
logits. Targets are PEFT's own choice for the family wherever it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from deltas import heads
from deltas.batch import Segment
from deltas.formats import DeltaFiles, read
from deltas.weights import FrozenTensors
from server.engine.kv import Attention
from tests.oracle.peft_reference import Row as Sequence
from tests.oracle.peft_reference import logits, quiet, randomise
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.unit.backbones import tiny

TOLERANCE = 1e-5
MATTERS = 0.01
STEPS = 4
LENGTHS = (9, 1, 21, 5, 14, 2)
TASK = {"task_type": "CAUSAL_LM"}

EMBEDDING = {"gpt_neox": "embed_in"}  # by family; embed_tokens elsewhere
NORMS = {
    "gpt_neox": ["input_layernorm", "final_layer_norm"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "qwen3": ["q_norm", "k_norm", "input_layernorm", "model.norm"],
    "gemma3_text": ["q_norm", "k_norm", "post_feedforward_layernorm", "model.norm"],
}


def configs(name: str) -> Mapping[str, PeftConfig]:
    family = tiny.family_of(name)
    embedding = EMBEDDING.get(family, "embed_tokens")

    def lora(**options: object) -> PeftConfig:
        return peft.LoraConfig(r=3, lora_alpha=5, **TASK, **options)

    return {
        "lora": lora(),
        "lora everywhere": lora(target_modules="all-linear", use_rslora=True),
        "lora, biases": lora(target_modules="all-linear", bias="all"),
        "lora on embedding and head": lora(target_modules=[embedding, "lm_head"]),
        "dora": lora(target_modules="all-linear", use_dora=True),
        "dora on embedding": lora(target_modules=[embedding], use_dora=True),
        "ia3": peft.IA3Config(**TASK),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=6, **TASK),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK),
        "norms": peft.LNTuningConfig(target_modules=NORMS.get(family), **TASK),
        "oft on embedding": peft.OFTConfig(oft_block_size=4, target_modules=[embedding], **TASK),
        "hira on embedding": peft.HiraConfig(r=3, target_modules=[embedding], **TASK),
        "tokens": peft.TrainableTokensConfig(token_indices=[3, 17, 40], target_modules=[embedding], **TASK),
        "saved": lora(target_modules="all-linear", modules_to_save=[embedding, "lm_head"]),
    }


def stock(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    with quiet():  # a classifier's head is new
        model: PreTrainedModel = kind.from_pretrained(folder, attn_implementation="eager", **options)
    return model.eval()


def saved(
    folder: Path,
    config: PeftConfig,
    backbone: Path,
    seed: int,
    kind: Any = AutoModelForCausalLM,
    **options: Any,
) -> PeftModel:
    """A random delta as PEFT saves it to ``folder``, and what PEFT makes of that folder.

    ``options`` are the model's, like ``num_labels``.
    """
    torch.manual_seed(seed)
    with quiet():
        model = peft.get_peft_model(stock(backbone, kind, **options), config)
        randomise(model, {}, 0.3)
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(stock(backbone, kind, **options), folder).eval()


def upload(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


def text(length: int) -> list[int]:
    make = torch.Generator().manual_seed(length)
    ids = torch.randint(3, tiny.VOCAB, (length,), generator=make).tolist()
    return [3, *ids[1:]]  # a token that "tokens" trains


def greedy(model: torch.nn.Module, tokens: list[int]) -> list[Tensor]:
    ids, found = list(tokens), []
    for _ in range(STEPS):
        last = logits(model, Sequence(tuple(ids)))[-1]
        found.append(last)
        ids.append(int(last.argmax()))
    return found


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_gives_pefts_logits(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    runner = make_runner(folder, torch.float32, capacity=tiny.POSITIONS)
    spec, frozen, own = runner.backbone.spec, FrozenTensors(folder), stock(folder)
    rows: list[tuple[Row, PeftModel]] = []
    for index, (case, config) in enumerate(configs(name).items()):
        where = tmp_path / case
        model = saved(where, config, folder, index)
        delta = read(upload(where), spec, frozen)
        placed = place(runner, delta)
        rows += [(Row(text(length), placed, case), model) for length in (2, LENGTHS[index % len(LENGTHS)])]
    bare = [Row(text(length)) for length in LENGTHS[:3]]
    generate(runner, [*(row for row, _ in rows), *bare], STEPS, chunk=23)
    moved = dict.fromkeys(configs(name), 0.0)
    for row, model in rows:
        expected = greedy(model, row.prompt)
        moved[row.name] = max(moved[row.name], same(greedy(own, row.prompt)[0], expected[0]))
        for step, source in enumerate(expected):
            assert same(row.logits[step], source) < TOLERANCE, (row.name, len(row.prompt), step)
    assert min(moved.values()) > MATTERS, moved


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_gives_pefts_classes(name: str, task: str, tmp_path: Path) -> None:
    kind = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}[task]
    if task == "TOKEN_CLS" and tiny.family_of(name) in ("opt", "gemma3_text"):
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            stock(tiny.save(name, tmp_path), kind)
        return
    folder = tiny.save(name, tmp_path)
    model = saved(tmp_path / "delta", peft.LoraConfig(r=3, task_type=task), folder, 1, kind)
    runner = make_runner(folder, torch.float32, capacity=tiny.POSITIONS)
    placed = place(runner, read(upload(tmp_path / "delta"), runner.backbone.spec, FrozenTensors(folder)))
    ids = torch.tensor([text(19)])
    attention = Attention(runner.kv, runner.ops.rows, [0], [0], [19])
    runner.hooks.plan = runner.ops.plan([Segment(0, 19, placed)], 19)
    with torch.no_grad():
        hidden = runner.forward(attention, torch.arange(19)[None], input_ids=ids)[0]
        wanted = model(input_ids=ids).logits[0]
    assert placed.head is not None
    assert same(heads.apply(placed.head, hidden), wanted) < TOLERANCE
