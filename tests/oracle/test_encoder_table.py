"""AdapterHub's column once more, through the engine's own encoder: every case in one packed batch, on every encoder."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from deltas import heads, methods
from deltas.bank import PackedDelta
from deltas.ops import Mode
from deltas.pack import pack
from deltas.weights import FrozenTensors
from server.engine import backbone as backbones
from server.engine.encoder import EncoderRow, EncoderRunner
from tests.oracle.padded import BACKBONES
from tests.oracle.test_adapterhub_table import INDEX, SERVED, check, expected, load


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_all_cases_in_one_batch(family: str, mode: Mode, tmp_path: Path) -> None:
    runner = EncoderRunner(
        backbones.load(family, BACKBONES / family, torch.device("cpu"), torch.float32), mode
    )
    spec, weights = runner.backbone.spec, FrozenTensors(BACKBONES / family)
    mixed: list[tuple[str, int, EncoderRow]] = []
    for case in ["base", *(case for of, case in SERVED if of == family)]:
        packed: PackedDelta | None = None
        if case != "base":
            (tmp_path / case).mkdir()
            delta = load(family, case, tmp_path / case)
            packed = pack(methods.lower(delta, spec, weights), spec, torch.float32)
        for n in range(INDEX[family]["rows"]):
            mixed.append((case, n, EncoderRow(expected(family)[f"ids.{n}"].tolist(), packed)))
    random.Random(family).shuffle(mixed)
    for (case, n, row), hidden in zip(mixed, runner.run([row for _, _, row in mixed]), strict=True):
        head = None if row.delta is None else row.delta.head
        if head is not None:
            check(family, case, n, heads.apply(head, hidden))
        else:
            logits = runner.logits(hidden[-len(row.ids) :], row.delta)
            assert logits is not None
            check(family, case, n, logits)
