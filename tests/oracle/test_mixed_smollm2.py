"""Twelve deltas of four kinds and base rows in one batch on the real SmolLM2-135M.

Every row equals the same row alone and its source's own output: LoRA and prompts by PEFT in this process, bottlenecks
and BitFit by the plain PyTorch reference that is itself held to AdapterHub's output.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from deltas.delta import Component, Delta
from deltas.formats import DeltaFiles, read
from deltas.sites import BackboneSpec
from tests.oracle import peft_files, reference
from tests.oracle.make_deltas import random_shifts, write_bottleneck
from tests.oracle.rows import Row, generate, make_runner, place, same

pytestmark = [pytest.mark.smollm2, pytest.mark.xdist_group("smollm2")]

STEPS = 8
LORAS = {
    "lora4": peft_files.lora(4, 8, ["q_proj", "v_proj"]),
    "lora8": peft_files.lora(8, 16),
    "lora32": peft_files.lora(32, 32, ["k_proj", "o_proj", "down_proj"], use_rslora=True),
}
PROMPTS = {
    "prompt4": peft_files.prompt(4),
    "prompt16": peft_files.prompt(16),
    "prompt30": peft_files.prompt(30),
}
BOTTLENECKS = {"seq_bn": 16, "double_seq_bn": 12, "par_bn": 24}
BITFITS = {"bitfit1": 1, "bitfit2": 2, "bitfit3": 3}


@pytest.fixture(scope="module")
def folders(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What users would upload: folders as the libraries save them."""
    root = tmp_path_factory.mktemp("deltas")

    def stock() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    made = peft_files.save(root, stock, LORAS, std=0.04) | peft_files.save(root, stock, PROMPTS, std=0.15)
    config = AutoConfig.from_pretrained(smollm2)
    for seed, (kind, factor) in enumerate(BOTTLENECKS.items()):
        made[kind] = root / kind
        made[kind].mkdir()
        write_bottleneck(made[kind], config, kind, name=kind, reduction_factor=factor, seed=seed, scale=0.5)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    rng = random.Random(3)
    names = [*LORAS, *PROMPTS, *BOTTLENECKS, *BITFITS, "base", "base2"]
    return {name: [rng.randrange(3, 49000) for _ in range(rng.randrange(3, 60))] for name in names}


def shifts_of(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    return random_shifts(model, seed=BITFITS[name], scale=0.3)


@contextmanager
def source(
    smollm2: Path, folders: dict[str, Path], name: str, dtype: torch.dtype
) -> Iterator[torch.nn.Module]:
    """The delta's own library (or the reference) with that delta on."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype, attn_implementation="eager").eval()
    if name in LORAS or name in PROMPTS:
        yield PeftModel.from_pretrained(model, folders[name]).eval()
    elif name in BITFITS:
        with reference.bitfit(model, shifts_of(model, name)):
            yield model
    else:
        with reference.bottleneck(model, folders[name]) if name in BOTTLENECKS else nullcontext():
            yield model


@torch.no_grad()
def teacher_forced(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> Tensor:
    """The source's float32 logits ``[steps, vocab]`` for each token, in one unpadded pass without a cache."""
    ids = torch.tensor([prompt + tokens[:-1]])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[-len(tokens) :].float()


def bitfit_delta(smollm2: Path, spec: BackboneSpec, name: str) -> Delta:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tensors = {f"{spec.by_path[path].name}/beta": beta for path, beta in shifts_of(model, name).items()}
    return Delta((Component("bitfit", {}, tensors),))


def mixed_and_alone(
    smollm2: Path, folders: dict[str, Path], prompts: dict[str, list[int]], dtype: torch.dtype
) -> tuple[list[Row], list[Row]]:
    runner = make_runner(smollm2, dtype)
    spec = runner.backbone.spec
    deltas = {
        name: read(DeltaFiles({p.name: p for p in path.iterdir()}), spec) for name, path in folders.items()
    }
    deltas |= {name: bitfit_delta(smollm2, spec, name) for name in BITFITS}
    packed = {name: place(runner, delta) for name, delta in deltas.items()}
    rows = [Row(prompt, packed.get(name), name) for name, prompt in prompts.items()]
    generate(runner, rows, STEPS, chunk=96)
    alone = [Row(row.prompt, row.delta, row.name) for row in rows]
    for row in alone:
        generate(runner, [row], STEPS)
    return rows, alone


def test_float32(smollm2: Path, folders: dict[str, Path], prompts: dict[str, list[int]]) -> None:
    rows, alone = mixed_and_alone(smollm2, folders, prompts, torch.float32)
    base = {row.name: row for row in rows if row.delta is None}
    for row, single in zip(rows, alone, strict=True):
        with source(smollm2, folders, row.name, torch.float32) as model:
            expected = teacher_forced(model, row.prompt, row.tokens)
        assert row.tokens == single.tokens == expected.argmax(-1).tolist(), row.name
        for step in range(STEPS):
            assert same(row.logits[step], expected[step]) < 1e-4, (row.name, step)
            assert same(row.logits[step], single.logits[step]) < 1e-4, (row.name, step)
    assert set(base) == {"base", "base2"}


def test_bfloat16(smollm2: Path, folders: dict[str, Path], prompts: dict[str, list[int]]) -> None:
    """Within bfloat16's noise: on average no further from the float32 truth than the source's own bfloat16 is."""
    rows, alone = mixed_and_alone(smollm2, folders, prompts, torch.bfloat16)
    for row, single in zip(rows, alone, strict=True):
        with source(smollm2, folders, row.name, torch.float32) as model:
            truth = teacher_forced(model, row.prompt, row.tokens)
        with source(smollm2, folders, row.name, torch.bfloat16) as model:
            theirs = teacher_forced(model, row.prompt, row.tokens)
        noise = sum(same(theirs[step], truth[step]) for step in range(STEPS)) / STEPS
        for found in (row, single):
            steps = [s for s in range(STEPS) if found.tokens[:s] == row.tokens[:s]]
            error = sum(same(found.logits[s], truth[s]) for s in steps) / len(steps)
            assert error < 1.5 * noise + 0.005, (row.name, error, noise)
