"""Whatever the deltas do, the backbone's tensors are the same bytes afterwards as before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from deltas.methods import METHODS
from deltas.ops import Mode
from tests.deltas_of_every_kind import make, served
from tests.oracle.padded import BACKBONES, PaddedRow, PaddedRunner
from tests.oracle.rows import Row, generate, make_runner, place


def checksum(model: Any) -> Mapping[str, str]:
    """Of every parameter and buffer, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        n: hashlib.sha256(t.detach().contiguous().view(-1).numpy().tobytes()).hexdigest() for n, t in named
    }


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
def test_served_rows_leave_the_backbone_as_it_was(mode: Mode) -> None:
    runner = make_runner(BACKBONES / "llama", torch.float32, mode, capacity=48)
    spec = runner.backbone.spec
    before = checksum(runner.backbone.model)
    rng = random.Random(5)
    rows = [
        Row(
            [rng.randrange(3, 60) for _ in range(rng.randrange(1, 9))],
            place(runner, make(spec, kind, seed)),
            kind,
        )
        for seed, kind in enumerate(served(spec))
    ]
    assert {row.name for row in rows} <= set(METHODS)
    for start in range(0, len(rows), 24):
        generate(runner, rows[start : start + 24], 3)
    assert checksum(runner.backbone.model) == before


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "t5"])
def test_every_family(family: str) -> None:
    runner = PaddedRunner(family)
    before = checksum(runner.model)
    decoder_ids = [0, 5, 9] if family == "t5" else None
    for start in range(0, len(served(runner.spec)), 16):
        rows = [
            PaddedRow([3 + seed, 7, 9], runner.place(make(runner.spec, kind, seed)), decoder_ids, kind)
            for seed, kind in enumerate(served(runner.spec)[start : start + 16])
        ]
        runner.logits(rows)
    assert checksum(runner.model) == before
