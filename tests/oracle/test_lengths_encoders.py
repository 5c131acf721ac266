"""Rows of 3 to 500 tokens with deltas and heads of every size, mixed in one batch of every encoder: as PEFT gives alone.

Heads of 2, 3, 5 and 151 labels, a regression, tags, words and vectors, on LoRA, DoRA, IA3, prompts and prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from deltas import heads, methods
from deltas.backbones import describe
from deltas.delta import Delta
from deltas.formats import read
from deltas.pack import pack
from deltas.weights import FrozenTensors
from server.engine import backbone as backbones
from server.engine.encoder import EncoderRow, EncoderRunner
from tests.encoders import add_tokenizer
from tests.oracle import lengths
from tests.oracle.peft_reference import FAMILIES
from tests.oracle.rows import same
from tests.oracle.test_peft_decoders import saved, stock, upload
from tests.unit.engine.test_encoder_engine import Harness

TOLERANCE = 1e-5
MATTERS = 0.01
MANY_VECTORS = ("tags", "two tags", "words")  # the engine answers a row with one
MODELS: dict[str | None, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
    None: AutoModelForMaskedLM,
}


def cases(family: str) -> dict[str, tuple[PeftConfig, int]]:
    """By name: what PEFT trains, and the number of labels."""
    encoder, parts = lengths.ENCODERS[family], FAMILIES[family]
    some: dict[str, Any] = {"target_modules": [*parts.query_value]}
    every: dict[str, Any] = {"target_modules": [*parts.linears]}
    scaled = every | {"feedforward_modules": [*parts.feedforward]}
    before = peft.PrefixTuningConfig if encoder.prefix else peft.PromptTuningConfig

    def task(name: str) -> dict[str, Any]:
        return {"task_type": name, "modules_to_save": list(encoder.head.get(name, ())) or None}

    classify, tag = task("SEQ_CLS"), task("TOKEN_CLS")
    return {
        "two labels": (peft.LoraConfig(r=3, lora_alpha=5, **some, **classify), 2),
        "three labels": (before(num_virtual_tokens=6, **encoder.prompt, **classify), 3),
        "five labels": (peft.LoraConfig(r=5, lora_alpha=7, use_dora=True, **some, **classify), 5),
        "151 labels": (peft.IA3Config(**scaled, **classify), 151),
        "a number": (peft.PromptTuningConfig(num_virtual_tokens=11, **encoder.prompt, **classify), 1),
        "tags": (peft.LoraConfig(r=17, lora_alpha=4, bias="all", **every, **tag), 7),
        "two tags": (peft.IA3Config(**scaled, **tag), 2),
        "words": (peft.LoraConfig(r=4, lora_alpha=6, **some), 0),
        "vectors": (peft.LoraConfig(r=2, lora_alpha=1, **every, task_type="FEATURE_EXTRACTION"), 0),
    }


@dataclass(frozen=True)
class Tuned:
    """A delta as the server reads it from what PEFT saved, and PEFT's own model with it."""

    delta: Delta
    model: Any


@dataclass(frozen=True)
class Family:
    """A backbone's folder, its own model, and its deltas by name."""

    folder: Path
    own: Any
    tuned: dict[str, Tuned]

    @torch.no_grad()
    def wanted(self, name: str, ids: list[int]) -> Tensor:
        """Logits ``[labels]``, ``[tokens, labels]`` or ``[tokens, vocab]``; for vectors hidden states."""
        model = self.tuned[name].model if name in self.tuned else self.own
        out = model(input_ids=torch.tensor([ids]))
        found: Tensor = (out.last_hidden_state if "last_hidden_state" in out else out.logits)[0]
        return found

    @torch.no_grad()
    def untuned(self, ids: list[int]) -> Tensor:
        """The backbone's own hidden states ``[tokens, hidden]``."""
        found: Tensor = self.own.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return found


@pytest.fixture(scope="module", params=sorted(lengths.ENCODERS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    scratch, encoder = tmp_path_factory.mktemp("lengths"), lengths.ENCODERS[request.param]
    folder = lengths.write(encoder.config(), AutoModelForMaskedLM, scratch / request.param)
    add_tokenizer(folder)
    spec, frozen = describe(encoder.config(), "oracle"), FrozenTensors(folder)
    tuned = {}
    for seed, (name, (config, labels)) in enumerate(cases(request.param).items()):
        options = {"num_labels": labels} if labels else {}
        model = saved(scratch / name, config, folder, seed, MODELS[config.task_type], **options)
        tuned[name] = Tuned(read(upload(scratch / name), spec, frozen), model)
    return Family(folder, stock(folder, AutoModelForMaskedLM), tuned)


def mixed(names: Iterable[str]) -> list[tuple[str, list[int]]]:
    return [(name, lengths.text(length, seed)) for seed, (name, length) in enumerate(lengths.spread(names))]


def test_every_length_and_head_in_one_batch(family: Family) -> None:
    runner = EncoderRunner(backbones.load("tiny", family.folder, torch.device("cpu"), torch.float32))
    spec, frozen = runner.backbone.spec, FrozenTensors(family.folder)
    placed = {
        name: pack(methods.lower(tuned.delta, spec, frozen), spec, torch.float32)
        for name, tuned in family.tuned.items()
    }

    def output(name: str, hidden: Tensor) -> Tensor:
        delta = placed.get(name)
        if delta is not None and delta.head is not None:
            return heads.apply(delta.head, hidden)
        logits = hidden if name == "vectors" else runner.logits(hidden, delta)
        assert logits is not None
        return logits

    rows = [(name, EncoderRow(ids, placed.get(name))) for name, ids in mixed(["base", *placed])]
    moved = dict.fromkeys(placed, 0.0)
    for (name, row), hidden in zip(rows, runner.run([row for _, row in rows]), strict=True):
        got, wanted = output(name, hidden), family.wanted(name, row.ids)
        assert got.shape == wanted.shape
        assert same(got, wanted) < TOLERANCE, (name, len(row.ids))
        if name in moved:
            moved[name] = max(moved[name], same(output(name, family.untuned(row.ids)), wanted))
    assert min(moved.values()) > MATTERS, moved


def test_the_engine_answers_rows_of_every_length(family: Family, tmp_path: Path) -> None:
    """Deltas come from stored files; the engine makes batches as rows and deltas arrive."""
    names = ["base", *(name for name in family.tuned if name not in MANY_VECTORS)]
    engine = Harness(family.folder, tmp_path, prefill_tokens=700, max_rows=8)
    try:
        refs = {name: engine.save(family.tuned[name].delta) for name in names if name != "base"}
        rows = mixed(names)
        for number, (name, ids) in enumerate(rows):
            engine.encode({number: ids}, refs.get(name), head=name in refs and name != "vectors")
        engine.wait(*range(len(rows)))
    finally:
        engine.close()
    assert not engine.failures
    for number, (name, ids) in enumerate(rows):
        wanted = family.untuned(ids) if name == "base" else family.wanted(name, ids)
        if name in ("base", "vectors"):
            wanted = wanted.mean(0)
        assert same(engine.vectors[number], wanted) < TOLERANCE, (name, len(ids))
