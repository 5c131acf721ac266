"""Jobs in one batch: each is what it is alone, touches nothing of the others, and fails alone.

Most comparisons are on backbones in float64: AdamW turns a gradient's rounding into a whole step where it is near zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.tuning.forward import Part, Passes, Scored
from server.tuning.messages import Failed, Finished, FromTuner, Stepped
from server.tuning.run import Run
from server.tuning.spec import Task
from server.tuning.trainer import Trainer
from tests import tuning

METHODS = ("lora", "bottleneck", "prompt", "prefix", "bitfit")
TASKS: tuple[Task, ...] = ("generate", "classify", "regress", "tag")
FAMILIES: Mapping[str, Task] = {"llama": "generate", "bert": "classify", "t5": "generate", "bart": "generate"}


def open_run(passes: Passes, folder: Path, name: str, task: Task, seed: int = 0, **more: object) -> Run:
    """A job of that method, its rows by its seed."""
    methods = [tuning.method(passes, name)]
    if task != "generate":
        methods.append(tuning.head(passes, task))
    rows = tuning.examples(task, 14, seed, kind=passes.backbone.spec.kind)
    spec = tuning.job(folder, methods, task, rows, seed=seed, learning_rate=1e-2, **more)
    return Run.open(spec, folder, passes)


def weights_of(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.parameters.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_together(family: str, tmp_path: Path) -> None:
    passes, task = tuning.passes_of(family, torch.float64), FAMILIES[family]
    alone = {}
    for seed, name in enumerate(METHODS):
        run = open_run(passes, tmp_path / f"alone-{name}", name, task, seed)
        tuning.train(passes, run)
        alone[name] = weights_of(run)
    runs = {
        name: open_run(passes, tmp_path / f"together-{name}", name, task, seed)
        for seed, name in enumerate(METHODS)
    }
    said = tuning.train(passes, *runs.values())
    assert sum(isinstance(message, Finished) for message in said) == len(METHODS)
    for name, run in runs.items():
        for key, found in run.parameters.items():
            torch.testing.assert_close(found.detach(), alone[name][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_together_in_float32(family: str, tmp_path: Path) -> None:
    """To what float32 rounds: every step's loss to 1e-5, what the deltas do to 1e-4, parameters to 1e-3.

    But for shifts of keys where no position is rotated into them: attention does not see them, so their gradients are
    nothing but rounding.
    """
    passes, task = tuning.passes_of(family), FAMILIES[family]
    alone, losses = {}, {}
    for seed, name in enumerate(METHODS):
        run = alone[name] = open_run(passes, tmp_path / f"alone-{name}", name, task, seed, epochs=3)
        losses[name] = losses_of(tuning.train(passes, run), run)
    runs = {
        name: open_run(passes, tmp_path / f"together-{name}", name, task, seed, epochs=3)
        for seed, name in enumerate(METHODS)
    }
    said = tuning.train(passes, *runs.values())
    rows = tuning.examples(task, 8, seed=9, kind=passes.backbone.spec.kind)
    for name, run in runs.items():
        assert losses_of(said, run) == pytest.approx(losses[name], rel=1e-5)
        with torch.no_grad():
            parts = [
                Part(task, rows, passes.bind(each._components.patches(None))) for each in (run, alone[name])
            ]
            ours, theirs = (
                output.outputs if isinstance(output, Scored) else output.losses for output in passes(parts)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for key, found in run.parameters.items():
            if family == "llama" or not key.endswith(".k/beta"):
                torch.testing.assert_close(found, alone[name].parameters[key], rtol=0, atol=1e-3)


def losses_of(said: list[FromTuner], run: Run) -> list[float]:
    return [m.loss for m in said if isinstance(m, Stepped) and m.job == run.spec.id]


def test_alone_twice_is_the_same_to_the_bit(tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    first, second = (
        open_run(passes, tmp_path / str(n), "diff_pruning", "generate", accumulation=2) for n in range(2)
    )
    tuning.train(passes, first)
    tuning.train(passes, second)
    for name, found in first.parameters.items():
        assert torch.equal(found, second.parameters[name])


def test_tasks_of_all_kinds_share_a_step(tmp_path: Path) -> None:
    """On an encoder-decoder some end in its encoder."""
    passes = tuning.passes_of("t5")
    runs = [open_run(passes, tmp_path / task, "lora", task) for task in TASKS]
    said = tuning.train(passes, *runs)
    assert sum(isinstance(message, Finished) for message in said) == 4


def test_a_step_changes_its_own_parameters_only(tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    before = tuning.digest_of(passes.backbone)
    stepping = open_run(passes, tmp_path / "a", "lora", "generate")
    waiting = open_run(passes, tmp_path / "b", "bitfit", "generate", seed=1, accumulation=3)
    kept = weights_of(waiting)
    tuning.train(passes, stepping, waiting, most=2)
    assert stepping.step == 2
    assert waiting.step == 0
    for name, found in waiting.parameters.items():
        assert torch.equal(found, kept[name])
    tuning.train(passes, stepping, waiting)
    assert tuning.digest_of(passes.backbone) == before
    assert not any(p.requires_grad or p.grad is not None for p in passes.backbone.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_run_that_diverges_fails_alone(family: str, poison: float, tmp_path: Path) -> None:
    passes, task = tuning.passes_of(family, torch.float64), FAMILIES[family]
    neighbours = [open_run(passes, tmp_path / f"with-{seed}", "lora", task, seed) for seed in (1, 2)]
    sick = open_run(passes, tmp_path / "sick", "bitfit", task)
    trainer = Trainer(passes)
    for run in (neighbours[0], sick, neighbours[1]):
        trainer.add(run)
    trainer.step()
    with torch.no_grad():
        next(iter(sick.parameters.values())).fill_(poison)
    said = trainer.step()
    (failed,) = (message for message in said if isinstance(message, Failed))
    assert (failed.job, failed.code) == ("sick", "diverged")
    assert {message.job for message in said if isinstance(message, Stepped)} == {"with-1", "with-2"}
    tuning.train(passes, *neighbours)
    healthy = [open_run(passes, tmp_path / f"without-{seed}", "lora", task, seed) for seed in (1, 2)]
    tuning.train(passes, *healthy)
    for run, other in zip(neighbours, healthy, strict=True):
        for name, found in run.parameters.items():
            torch.testing.assert_close(found, other.parameters[name], rtol=1e-4, atol=1e-5)


def test_rows_of_uneven_lengths_are_averaged_over_the_whole_step(tmp_path: Path) -> None:
    """Four micro-batches of two are one of eight."""
    passes = tuning.passes_of("llama", torch.float64)
    whole = open_run(passes, tmp_path / "whole", "lora", "generate", batch_size=8)
    parts = open_run(passes, tmp_path / "parts", "lora", "generate", batch_size=2, accumulation=4)
    said = [tuning.train(passes, run) for run in (whole, parts)]
    losses = [[message.loss for message in found if isinstance(message, Stepped)] for found in said]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, found in whole.parameters.items():
        torch.testing.assert_close(found, parts.parameters[name], rtol=1e-4, atol=1e-5)
