"""Deltas that were trained, in the engine: on sentences that they never saw they give what their plain models give."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from deltas import heads, methods
from deltas.bank import PackedDelta
from deltas.formats import DeltaFiles, read
from deltas.pack import pack
from deltas.weights import FrozenTensors
from server.engine import backbone as backbones
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.tokenizer import Tokenizer
from tests.oracle.rows import same
from tests.trained import MINILM, Trained

TOLERANCE = 1e-5
MATTERS = 0.1


@pytest.fixture(scope="module")
def runner() -> EncoderRunner:
    folder = backbones.locate(MINILM).folder
    return EncoderRunner(backbones.load("minilm", folder, torch.device("cpu"), torch.float32))


def place(runner: EncoderRunner, known: Trained) -> PackedDelta:
    spec, frozen = runner.backbone.spec, FrozenTensors(runner.backbone.folder)
    delta = read(DeltaFiles({path.name: path for path in known.files}), spec, frozen)
    return pack(methods.lower(delta, spec, frozen), spec, torch.float32)


def rows(runner: EncoderRunner, known: Trained, delta: PackedDelta | None) -> list[EncoderRow]:
    tokenizer = Tokenizer(runner.backbone.folder)
    return [EncoderRow(tokenizer.encode(text), delta) for text in known.texts]


def outputs(hidden: list[Tensor], delta: PackedDelta) -> Tensor:
    assert delta.head is not None
    return torch.stack([heads.apply(delta.head, states) for states in hidden])


def test_training_learnt_the_tasks(trained: dict[str, Trained]) -> None:
    """On held-out templates and words; a guess would be right for a half and a fifth, and off by the whole variance."""
    for known in trained.values():
        assert not {example.text for example in known.task.training} & set(known.texts)
        if known.kind == "classify":
            right = (known.outputs.argmax(1) == known.targets).float().mean()
            assert float(right) > 0.9, known.name
        else:
            error = (known.outputs[:, 0] - known.targets).square().mean()
            assert float(error) < 0.2 * float(known.targets.var()), known.name


@pytest.mark.parametrize("name", ["sentiment", "topic", "intensity"])
def test_alone(name: str, trained: dict[str, Trained], runner: EncoderRunner) -> None:
    known = trained[name]
    delta = place(runner, known)
    own = rows(runner, known, delta)
    hidden = [runner.run([row])[0] for row in own]
    assert same(outputs(hidden, delta), known.outputs) < TOLERANCE
    untuned = runner.run([EncoderRow(row.ids) for row in own])
    assert same(outputs(untuned, delta), known.outputs) > MATTERS


def test_all_in_one_batch(trained: dict[str, Trained], runner: EncoderRunner) -> None:
    placed = {name: place(runner, known) for name, known in trained.items()}
    mixed = [
        (name, n, row)
        for name, known in trained.items()
        for n, row in enumerate(rows(runner, known, placed[name]))
    ]
    random.Random(0).shuffle(mixed)
    hidden = runner.run([row for _, _, row in mixed])
    for name, known in trained.items():
        own = {n: states for (of, n, _), states in zip(mixed, hidden, strict=True) if of == name}
        found = outputs([own[n] for n in range(len(own))], placed[name])
        assert same(found, known.outputs) < TOLERANCE, name
