"""Checkpoints: a job that was killed ends as one that was not, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltas.formats import native
from server.tuning import checkpoint
from server.tuning.components import components_of
from server.tuning.forward import Passes
from server.tuning.messages import Checkpointed, Finished
from server.tuning.run import Run
from server.tuning.spec import EarlyStopping
from server.tuning.trainer import Trainer
from tests import tuning

KILLED = """
import os, signal, sys
from pathlib import Path
from server.tuning.trainer import Trainer
from tests import tuning
from tests.unit.tuning.test_resume import open_run
passes = tuning.passes_of("llama")
trainer = Trainer(passes)
trainer.add(open_run(passes, Path(sys.argv[1])))
for _ in range(int(sys.argv[2])):
    trainer.step()
os.kill(os.getpid(), signal.SIGKILL)
"""


def open_run(passes: Passes, folder: Path, **more: object) -> Run:
    """Dropout of gates and moments of two methods, evaluated now and then."""
    methods = [tuning.method(passes, "diff_pruning"), tuning.method(passes, "prompt")]
    rows, valid = (tuning.examples("generate", 20, seed) for seed in (0, 1))
    settings = {"valid": valid, "accumulation": 2, "epochs": 3, "evaluate_every": 2, "checkpoint_every": 2}
    spec = tuning.job(folder, methods, "generate", rows, **{**settings, **more})
    return Run.open(spec, folder, passes)


def delta_of(run: Run) -> str:
    return native.load(Path(run.finished().file)).digest


@pytest.mark.parametrize("batches", [5, 12])
def test_killed_and_resumed(batches: int, tmp_path: Path) -> None:
    """In a process of its own, after so many micro-batches: inside a step, at its end, behind checkpoints."""
    passes = tuning.passes_of("llama")
    whole = open_run(passes, tmp_path / "whole")
    tuning.train(passes, whole)
    folder = tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(batches)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed = open_run(passes, folder)
    assert resumed.step == (batches // 2) // 2 * 2
    tuning.train(passes, resumed)
    assert delta_of(resumed) == delta_of(whole)
    for name, found in whole.parameters.items():
        assert torch.equal(found, resumed.parameters[name])
    assert resumed.books == whole.books


def test_a_checkpoint_on_demand_is_of_the_last_whole_step(tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    whole = open_run(passes, tmp_path / "whole", checkpoint_every=100)
    tuning.train(passes, whole)
    run = open_run(passes, tmp_path / "paused", checkpoint_every=100, evaluate_every=100)
    tuning.train(passes, run, most=3)  # in the middle of the second step
    assert run.checkpoint().step == 1
    resumed = open_run(passes, tmp_path / "paused", checkpoint_every=100)
    assert resumed.step == 1
    tuning.train(passes, resumed)
    for name, found in whole.parameters.items():
        assert torch.equal(found, resumed.parameters[name])


def test_the_newest_whole_one_wins(tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    run = open_run(passes, tmp_path / "job")
    tuning.train(passes, run, most=8)
    folder = tmp_path / "job" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    for file in (checkpoint.TENSORS, checkpoint.NUMBERS, checkpoint.DELTA):
        copy = tmp_path / f"damaged-{file}"
        shutil.copytree(tmp_path / "job", copy)
        damaged = copy / "checkpoints" / "step-4" / file
        content = bytearray(damaged.read_bytes())
        content[-20] ^= 0xFF
        damaged.write_bytes(content)
        assert open_run(passes, copy).step == 2
    (folder / ".writing-6-1").mkdir()  # what a kill leaves
    assert open_run(passes, tmp_path / "job").step == 4


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    rows = tuning.examples("generate", 4)
    passes = tuning.passes_of("llama")
    components = components_of(
        tuning.job(tmp_path / "job", [tuning.method(passes, "ln")], "generate", rows),
        passes.weights,
        passes.backbone.device,
    )
    folder = tmp_path / "job" / "checkpoints"
    for step in (1, 2, 3, 5, 8, 13):
        checkpoint.write(
            folder, checkpoint.Saved(step, {"x": torch.ones(step)}, {"n": step}), components.delta()
        )
        checkpoint.prune(folder, best=2)
    assert {path.name for path in folder.iterdir()} == {"step-2", "step-5", "step-8", "step-13"}
    newest = checkpoint.newest(folder)
    assert newest is not None
    assert (newest.step, newest.numbers) == (13, {"n": 13})
    assert torch.equal(newest.tensors["x"], torch.ones(13))


def test_early_stopping(tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    run = open_run(
        passes,
        tmp_path / "job",
        learning_rate=3.0,
        schedule="constant",
        epochs=20,
        early_stopping=EarlyStopping(patience=2),
    )
    said = tuning.train(passes, run)
    finished = said[-1]
    assert isinstance(finished, Finished)
    assert finished.early
    assert finished.step == finished.best_step + 4
    again = Trainer(passes)
    again.add(open_run(passes, tmp_path / "job", learning_rate=3.0, epochs=20))
    assert again.step() == [finished]  # killed before it was published: said again, nothing is trained
    assert again.runs == []


def test_what_is_written_is_said(tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    said = tuning.train(passes, open_run(passes, tmp_path / "job"))
    steps = [message.step for message in said if isinstance(message, Checkpointed)]
    assert steps == [2, 4, 6, 8, 9]
