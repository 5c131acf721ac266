"""PEFT's models for tasks: the head comes with the delta, and our outputs are PEFT's."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from deltas.delta import Delta
from deltas.errors import UnsupportedDelta
from deltas.formats import DeltaFiles, read
from tests.oracle.padded import PaddedRow, PaddedRunner
from tests.oracle.peft_reference import BACKBONES, FAMILIES, PROMPT_SIZES, ROWS, quiet, randomise

TOLERANCE = 1e-5
TASKS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
SAVED = "adapter_model.safetensors"


@cache
def runner(family: str) -> PaddedRunner:
    return PaddedRunner(family)


def config(kind: str, family: str, task: str) -> PeftConfig:
    saved = {("bert", "SEQ_CLS"): ["pooler"]}.get(
        (family, task), ["head"] if family == "modernbert" else None
    )
    if kind == "lora":
        targets = list(FAMILIES[family].linears)
        return peft.LoraConfig(
            r=3, target_modules=targets, task_type=TaskType[task], modules_to_save=saved, bias="all"
        )
    if kind == "ia3":
        names = FAMILIES[family]
        return peft.IA3Config(
            target_modules=list({*names.query_value, *names.feedforward}),
            feedforward_modules=list(names.feedforward),
            task_type=TaskType[task],
            modules_to_save=saved,
        )
    return peft.PromptTuningConfig(
        num_virtual_tokens=3, task_type=TaskType[task], modules_to_save=saved, **PROMPT_SIZES.get(family, {})
    )


def task_model(folder: Path, task: str, labels: int = 3) -> PreTrainedModel:
    """The backbone with an untrained head."""
    torch.manual_seed(5)
    with quiet():
        model: PreTrainedModel = TASKS[task].from_pretrained(folder, num_labels=labels, dtype=torch.float32)
    return model.eval()


def save(model: PeftModel, folder: Path) -> None:
    torch.manual_seed(6)
    randomise(model, {r"classifier|score": (0.0, 0.3)}, 0.15)
    with quiet():
        model.save_pretrained(folder)
    assert (folder / SAVED).is_file()


@torch.no_grad()
def outputs(model: PeftModel) -> list[Tensor]:
    return [model.eval()(input_ids=torch.tensor([row.ids])).logits[0] for row in ROWS]


def ours(folder: Path, over: PaddedRunner) -> tuple[Delta, list[Tensor]]:
    delta = read(DeltaFiles({path.name: path for path in folder.iterdir()}), over.spec, over.weights)
    placed = over.place(delta)
    return delta, over.classes([PaddedRow(row.ids, placed) for row in ROWS])


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_heads_give_pefts_outputs(kind: str, family: str, task: str, tmp_path: Path) -> None:
    with quiet():
        model = peft.get_peft_model(task_model(BACKBONES / family, task), config(kind, family, task))
    save(model, tmp_path)
    delta, got = ours(tmp_path, runner(family))
    (head,) = [part for part in delta.components if part.method == "head"]
    assert head.config["kind"] == ("classify" if task == "SEQ_CLS" else "tag")
    assert_same(got, outputs(model))


def test_one_label_is_a_regression(tmp_path: Path) -> None:
    with quiet():
        model = peft.get_peft_model(
            task_model(BACKBONES / "gpt2", "SEQ_CLS", 1), config("lora", "gpt2", "SEQ_CLS")
        )
    save(model, tmp_path)
    delta, got = ours(tmp_path, runner("gpt2"))
    assert delta.components[-1].config["kind"] == "regress"
    assert_same(got, outputs(model))


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_pooler_is_the_backbones_where_the_delta_has_none(prefixed: bool, tmp_path: Path) -> None:
    backbone, folder = tmp_path / "backbone", tmp_path / "delta"
    shutil.copytree(BACKBONES / "bert", backbone)
    plain = config("lora", "bert", "SEQ_CLS")
    plain.modules_to_save, plain.bias = None, "none"
    with quiet():
        model = peft.get_peft_model(task_model(BACKBONES / "bert", "SEQ_CLS"), plain)
    save(model, folder)
    with pytest.raises(UnsupportedDelta) as caught:
        ours(folder, runner("bert"))
    assert caught.value.field == "bert.pooler.dense.weight"

    tensors = load_file(backbone / "model.safetensors")
    pooler = model.get_base_model().bert.pooler.dense
    stem = "bert.pooler.dense" if prefixed else "pooler.dense"
    tensors |= {f"{stem}.weight": pooler.weight.data, f"{stem}.bias": pooler.bias.data}
    save_file(tensors, backbone / "model.safetensors", {"format": "pt"})
    with quiet():
        over = PaddedRunner(backbone)
    _, got = ours(folder, over)
    assert_same(got, outputs(model))


@pytest.mark.parametrize("task", TASKS)
def test_modernberts_head_is_the_backbones_where_the_delta_has_none(task: str, tmp_path: Path) -> None:
    """Its class for a task begins with the language model's dense layer and norm."""
    plain = config("lora", "modernbert", task)
    plain.modules_to_save = None
    with quiet():
        model = peft.get_peft_model(task_model(BACKBONES / "modernbert", task), plain)
    save(model, tmp_path)
    assert not [key for key in load_file(tmp_path / SAVED) if "head" in key]
    _, got = ours(tmp_path, runner("modernbert"))
    assert_same(got, outputs(model))


def test_a_lora_inside_the_head_is_refused(tmp_path: Path) -> None:
    """The language model's head, which has a module of that name, is not what it changes."""
    everywhere = peft.LoraConfig(target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    with quiet():
        model = peft.get_peft_model(task_model(BACKBONES / "modernbert", "SEQ_CLS"), everywhere)
    save(model, tmp_path)
    with pytest.raises(UnsupportedDelta, match=r"head\.dense .* modules_to_save") as caught:
        ours(tmp_path, runner("modernbert"))
    assert caught.value.field == "target_modules"


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
def test_a_prefix_for_a_model_without_a_cache_is_refused(family: str, tmp_path: Path) -> None:
    """PEFT makes and saves one for a feature extractor, and it changes nothing."""
    layers = runner(family).spec.layers
    sizes = {"token_dim": 32, "num_attention_heads": 4, "num_layers": layers}
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=TaskType.FEATURE_EXTRACTION, **sizes)
    with quiet():
        model = peft.get_peft_model(task_model(BACKBONES / family, "SEQ_CLS").base_model, prefix)
    save(model, tmp_path)
    with pytest.raises(UnsupportedDelta, match="a cache") as caught:
        ours(tmp_path, runner(family))
    assert caught.value.field == "peft_type"


def test_a_task_without_its_head_is_refused(tmp_path: Path) -> None:
    with quiet():
        model = peft.get_peft_model(
            task_model(BACKBONES / "llama", "SEQ_CLS"), config("ia3", "llama", "SEQ_CLS")
        )
    save(model, tmp_path)
    tensors = {key: value for key, value in load_file(tmp_path / SAVED).items() if "score" not in key}
    save_file(tensors, tmp_path / SAVED)
    with pytest.raises(UnsupportedDelta, match=r"score\.weight") as caught:
        ours(tmp_path, runner("llama"))
    assert caught.value.field == "task_type"
