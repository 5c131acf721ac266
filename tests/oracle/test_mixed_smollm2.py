"""Twelve deltas of four kinds and base rows in one batch on the real SmolLM2-135M.

Every row equals the same row alone and its source's own output: LoRA and prompts by PEFT in this process, bottlenecks
and BitFit by the plain PyTorch reference that is itself held to AdapterHub's output.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from deltas.formats import DeltaFiles, read
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.oracle.twelve import BITFITS, NAMES, bitfit_delta, source, teacher_forced

pytestmark = [pytest.mark.smollm2, pytest.mark.xdist_group("smollm2")]

STEPS = 8


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    rng = random.Random(3)
    names = [*NAMES, "base", "base2"]
    return {name: [rng.randrange(3, 49000) for _ in range(rng.randrange(3, 60))] for name in names}


def mixed_and_alone(
    smollm2: Path, twelve: dict[str, Path], prompts: dict[str, list[int]], dtype: torch.dtype
) -> tuple[list[Row], list[Row]]:
    runner = make_runner(smollm2, dtype)
    spec = runner.backbone.spec
    deltas = {
        name: read(DeltaFiles({p.name: p for p in path.iterdir()}), spec) for name, path in twelve.items()
    }
    deltas |= {name: bitfit_delta(smollm2, spec, name) for name in BITFITS}
    packed = {name: place(runner, delta) for name, delta in deltas.items()}
    rows = [Row(prompt, packed.get(name), name) for name, prompt in prompts.items()]
    generate(runner, rows, STEPS, chunk=96)
    alone = [Row(row.prompt, row.delta, row.name) for row in rows]
    for row in alone:
        generate(runner, [row], STEPS)
    return rows, alone


def test_float32(smollm2: Path, twelve: dict[str, Path], prompts: dict[str, list[int]]) -> None:
    rows, alone = mixed_and_alone(smollm2, twelve, prompts, torch.float32)
    base = {row.name: row for row in rows if row.delta is None}
    for row, single in zip(rows, alone, strict=True):
        with source(smollm2, twelve, row.name, torch.float32) as model:
            expected = teacher_forced(model, row.prompt, row.tokens)
        assert row.tokens == single.tokens == expected.argmax(-1).tolist(), row.name
        for step in range(STEPS):
            assert same(row.logits[step], expected[step]) < 1e-4, (row.name, step)
            assert same(row.logits[step], single.logits[step]) < 1e-4, (row.name, step)
    assert set(base) == {"base", "base2"}


def test_bfloat16(smollm2: Path, twelve: dict[str, Path], prompts: dict[str, list[int]]) -> None:
    """Within bfloat16's noise: on average no further from the float32 truth than the source's own bfloat16 is."""
    rows, alone = mixed_and_alone(smollm2, twelve, prompts, torch.bfloat16)
    for row, single in zip(rows, alone, strict=True):
        with source(smollm2, twelve, row.name, torch.float32) as model:
            truth = teacher_forced(model, row.prompt, row.tokens)
        with source(smollm2, twelve, row.name, torch.bfloat16) as model:
            theirs = teacher_forced(model, row.prompt, row.tokens)
        noise = sum(same(theirs[step], truth[step]) for step in range(STEPS)) / STEPS
        for found in (row, single):
            steps = [s for s in range(STEPS) if found.tokens[:s] == row.tokens[:s]]
            error = sum(same(found.logits[s], truth[s]) for s in steps) / len(steps)
            assert error < 1.5 * noise + 0.005, (row.name, error, noise)
