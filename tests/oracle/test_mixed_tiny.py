"""A mixed batch on a tiny Llama: every row equals the same row alone and its source's own output, in every mode."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltas.formats import DeltaFiles, read
from deltas.ops import Mode
from tests.oracle import peft_files, reference
from tests.oracle.make_deltas import random_shifts
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.oracle.twelve import native_bitfit

FIXTURES = Path(__file__).parent / "fixtures" / "adapterhub"
BACKBONE = FIXTURES / "backbone"
STEPS = 6
TOLERANCE = 1e-5


def stock() -> torch.nn.Module:
    """Hugging Face's own model, untouched by ours."""
    return AutoModelForCausalLM.from_pretrained(
        BACKBONE, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def folder_files(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs and prompts as PEFT saves them, with every weight random."""
    configs = {
        "lora4": peft_files.lora(4, 8, ["q_proj", "v_proj"]),
        "lora16": peft_files.lora(16, 16, use_rslora=True),
        "prompt3": peft_files.prompt(3),
        "prompt11": peft_files.prompt(11),
    }
    return peft_files.save(tmp_path_factory.mktemp("peft"), stock, configs, std=0.3)


def expected_tokens(name: str, saved: dict[str, Path], prompt: list[int]) -> list[Tensor]:
    """The source's own logits for each greedy step, each by a full pass without a cache."""
    model = stock()
    if name in saved:
        model = PeftModel.from_pretrained(model, saved[name]).eval()
        return greedy(model, prompt)
    if name.startswith("bitfit"):
        with reference.bitfit(model, random_shifts(model, seed=int(name[6:]), scale=0.3)):
            return greedy(model, prompt)
    if name == "base":
        return greedy(model, prompt)
    with reference.bottleneck(model, FIXTURES / name):
        return greedy(model, prompt)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[Tensor]:
    ids, found = list(prompt), []
    for _ in range(STEPS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        found.append(logits)
        ids.append(int(logits.argmax()))
    return found


BOTTLENECKS = [
    "seq_bn",
    "double_seq_bn",
    "par_bn",
    "seq_bn_leave_out",
    "double_seq_bn_by_layer",
    "par_bn_gelu",
]


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
def test_mixed_equals_alone_equals_source(mode: Mode, saved: dict[str, Path]) -> None:
    runner = make_runner(BACKBONE, torch.float32, mode)
    spec = runner.backbone.spec
    deltas = {name: read(folder_files(path), spec) for name, path in saved.items()}
    deltas |= {name: read(folder_files(FIXTURES / name), spec) for name in BOTTLENECKS}
    for seed in (1, 2):
        deltas[f"bitfit{seed}"] = native_bitfit(random_shifts(stock(), seed=seed, scale=0.3), spec)
    packed = {name: place(runner, delta) for name, delta in deltas.items()}
    rng = random.Random(7)
    names = [*packed, "base", "base", "lora4", "par_bn"]
    rng.shuffle(names)
    lengths = [1, 2, 60, 5, 17, 33]
    rows = [
        Row([rng.randrange(128) for _ in range(lengths[i % len(lengths)])], packed.get(name), name)
        for i, name in enumerate(names)
    ]
    generate(runner, rows, STEPS, chunk=70)
    for row in rows:
        alone = Row(row.prompt, row.delta, row.name)
        generate(runner, [alone], STEPS)
        for step, source in enumerate(expected_tokens(row.name, saved, row.prompt)):
            assert same(row.logits[step], source) < TOLERANCE, (row.name, len(row.prompt), step)
            assert same(alone.logits[step], source) < TOLERANCE, (row.name, len(row.prompt), step)
        assert row.tokens == alone.tokens
        base = Row(row.prompt)
        if row.delta is not None:
            generate(runner, [base], STEPS)
            assert same(base.logits[0], row.logits[0]) > 0.01, f"{row.name} changes nothing"
