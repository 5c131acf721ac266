"""Sums of deltas through the engine's own loader and runner: PEFT's weighted adapters, and changes applied one after
another by the libraries' own mathematics.
"""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltas.bank import PackedDelta
from deltas.delta import Delta
from deltas.formats import DeltaFiles, native, read
from deltas.weights import FrozenTensors
from server.engine.residency import Residency
from server.engine.runner import Runner
from server.types import DeltaPart, DeltaRef
from tests.oracle import peft_files, reference
from tests.oracle.make_deltas import random_shifts
from tests.oracle.rows import Row, generate, make_runner, same
from tests.oracle.twelve import native_bitfit

FIXTURES = Path(__file__).parent / "fixtures" / "adapterhub"
BACKBONE = FIXTURES / "backbone"
STEPS = 4
TOLERANCE = 1e-5
PROMPTS = ([5], [9, 8, 7, 6, 5], [(3 + 7 * i) % 120 for i in range(40)])


def stock() -> Any:
    """Hugging Face's own model, untouched by ours."""
    return AutoModelForCausalLM.from_pretrained(
        BACKBONE, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    configs = {
        "lora4": peft_files.lora(4, 8, ["q_proj", "v_proj"]),
        "lora16": peft_files.lora(16, 24),
        "prompt3": peft_files.prompt(3),
    }
    return peft_files.save(tmp_path_factory.mktemp("peft"), stock, configs, std=0.2)


class Loader:
    """What the engine has between a reference and a row: files, the residency, the runner."""

    def __init__(self, folder: Path, saved: dict[str, Path]) -> None:
        self.runner: Runner = make_runner(BACKBONE, torch.float32)
        self.spec = self.runner.backbone.spec
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wait = woken.get
        self.tiers = Residency(
            self.spec,
            torch.float32,
            self.runner.backbone.device,
            weights=FrozenTensors(BACKBONE),
            device_bytes=1 << 30,
            host_bytes=1 << 30,
            finish=self.runner.finish,
            pinned_share=0.5,
            forget=self.runner.forget,
            wake=lambda: woken.put(None),
        )
        self.files: dict[str, tuple[str, str]] = {}
        for name, path in saved.items():
            self.keep(folder, name, read(DeltaFiles({file.name: file for file in path.iterdir()}), self.spec))
        for seed in (1, 2):
            self.keep(folder, f"bitfit{seed}", native_bitfit(shifts(seed), self.spec))
        for name in ("seq_bn", "double_seq_bn", "par_bn"):
            files = {file.name: file for file in (FIXTURES / name).iterdir()}
            self.keep(folder, name, read(DeltaFiles(files), self.spec))

    def keep(self, folder: Path, name: str, delta: Delta) -> None:
        path = folder / f"{name}.safetensors"
        native.save(delta, path)
        self.files[name] = delta.digest, str(path)

    def ref(self, terms: Sequence[tuple[str, float]]) -> DeltaRef:
        return DeltaRef.of_sum(DeltaPart(*self.files[name], weight) for name, weight in terms)

    def load(self, *terms: tuple[str, float]) -> PackedDelta:
        ref = self.ref(terms)
        self.tiers.prefetch(ref)
        self._wait(timeout=60)
        assert self.tiers.collect() == []
        found = self.tiers.resident(ref)
        assert found is not None
        return found

    def logits(self, *terms: tuple[str, float]) -> list[list[Tensor]]:
        """Of the greedy steps after each of ``PROMPTS``, all in one batch with the backbone's own rows."""
        delta = self.load(*terms) if terms else None
        rows = [Row([*prompt], delta) for prompt in PROMPTS]
        generate(self.runner, [*rows, *(Row([*prompt]) for prompt in PROMPTS)], STEPS, chunk=30)
        return [row.logits for row in rows]


@pytest.fixture(scope="module")
def loader(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    made = Loader(tmp_path_factory.mktemp("native"), saved)
    yield made
    made.tiers.close()


def shifts(seed: int) -> dict[str, Tensor]:
    return random_shifts(stock(), seed=seed, scale=0.3)


def bitfit(model: nn.Module, seed: int, weight: float) -> AbstractContextManager[None]:
    return reference.bitfit(model, {name: beta * weight for name, beta in shifts(seed).items()})


def bottleneck(model: nn.Module, name: str, weight: float, folder: Path) -> AbstractContextManager[None]:
    """The adapter with its own scaling times ``weight``."""
    copy = folder / f"{name}-{weight}"
    shutil.copytree(FIXTURES / name, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    config["config"]["scaling"] *= weight
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return reference.bottleneck(model, copy)


@torch.no_grad()
def greedy(model: nn.Module) -> list[list[Tensor]]:
    """The model's own logits for each greedy step after each prompt, each by a full pass without a cache."""
    found: list[list[Tensor]] = []
    for prompt in PROMPTS:
        ids, steps = [*prompt], []
        for _ in range(STEPS):
            steps.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(steps[-1].argmax()))
        found.append(steps)
    return found


def check(ours: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for row, source in zip(ours, expected, strict=True):
        for step in range(STEPS):
            assert same(row[step], source[step]) < TOLERANCE, (len(source), step)


def differ(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return min(same(a[0], b[0]) for a, b in zip(one, other, strict=True)) > 0.01


def weighted_in_peft(saved: dict[str, Path], *terms: tuple[str, float]) -> PeftModel:
    """PEFT's own exact sum: factors stacked, weights and scales folded in."""
    names = [name for name, _ in terms]
    model = PeftModel.from_pretrained(stock(), saved[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(saved[name], name)
    model.add_weighted_adapter(names, [weight for _, weight in terms], "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.eval()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (2.5, 0.125)])
def test_loras_as_peft_adds_them(
    loader: Loader, saved: dict[str, Path], weights: tuple[float, float]
) -> None:
    terms = tuple(zip(("lora4", "lora16"), weights, strict=True))
    ours = loader.logits(*terms)
    check(ours, greedy(weighted_in_peft(saved, *terms)))
    assert differ(ours, loader.logits())
    check(loader.logits(*reversed(terms)), ours)  # of low rank alone, the order does not matter


def test_one_delta_with_a_weight(loader: Loader, saved: dict[str, Path]) -> None:
    ours = loader.logits(("lora16", 0.5))
    check(ours, greedy(weighted_in_peft(saved, ("lora16", 0.5))))
    assert differ(ours, loader.logits(("lora16", 1.0)))
    check(loader.logits(("lora16", 0.25), ("lora16", 0.25)), ours)


def test_a_delta_minus_itself_is_the_backbone(loader: Loader) -> None:
    check(
        loader.logits(("lora16", 0.7), ("bitfit1", 1.0), ("lora16", -0.7), ("bitfit1", -1.0)), loader.logits()
    )


def test_a_lora_and_two_bitfits(loader: Loader, saved: dict[str, Path]) -> None:
    ours = loader.logits(("lora16", 0.7), ("bitfit1", 0.3), ("bitfit2", -0.5))
    model = weighted_in_peft(saved, ("lora16", 0.7))
    with bitfit(model.base_model.model, 1, 0.3), bitfit(model.base_model.model, 2, -0.5):
        check(ours, greedy(model))


@pytest.mark.parametrize("names", [("seq_bn", "double_seq_bn"), ("double_seq_bn", "par_bn", "seq_bn")])
def test_bottlenecks_chain_in_their_order(loader: Loader, names: tuple[str, ...], tmp_path: Path) -> None:
    terms = [(name, 0.7 - 0.2 * n) for n, name in enumerate(names)]
    model = stock()

    def chained(order: Sequence[tuple[str, float]], folder: Path) -> list[list[Tensor]]:
        with ExitStack() as stack:
            for name, weight in order:  # hooks of one module run in the order in which they were set
                stack.enter_context(bottleneck(model, name, weight, folder))
            return greedy(model)

    ours, backwards = loader.logits(*terms), loader.logits(*reversed(terms))
    check(ours, chained(terms, tmp_path / "forward"))
    check(backwards, chained(terms[::-1], tmp_path / "backward"))
    assert min(same(a[0], b[0]) for a, b in zip(ours, backwards, strict=True)) > 100 * TOLERANCE
    assert loader.ref(terms).digest != loader.ref(terms[::-1]).digest


def test_four_kinds_at_once(loader: Loader, saved: dict[str, Path], tmp_path: Path) -> None:
    """A prompt is computed with the other terms on, as it is by the library in front of a changed model."""
    ours = loader.logits(("prompt3", 1.0), ("bitfit1", 0.5), ("seq_bn", 0.8), ("lora16", 0.4))
    inner = weighted_in_peft(saved, ("lora16", 0.4)).merge_and_unload()
    with bottleneck(inner, "seq_bn", 0.8, tmp_path), bitfit(inner, 1, 0.5):
        check(ours, greedy(PeftModel.from_pretrained(inner, saved["prompt3"]).eval()))
