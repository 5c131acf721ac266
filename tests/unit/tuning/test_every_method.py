"""Every method that can be trained goes through the trainer, and ends as a delta that the backbone takes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch

from deltas import methods
from deltas.formats import native
from deltas.tuned import TUNABLE, before_head, tunable
from server.engine import backbone as backbones
from server.tuning.forward import Passes
from server.tuning.messages import Finished
from server.tuning.run import Run
from server.tuning.spec import Example, JobSpec, MethodSpec, Task
from server.tuning.trainer import Trainer
from tests.oracle.padded import BACKBONES
from tests.tunables import GIVEN

ROWS = [[5 + (n * k) % 50 for k in range(1, 7 + n % 3)] for n in range(1, 9)]
CASES: list[tuple[str, str, Task]] = [
    (name, family, task)
    for family, task in (("llama", "generate"), ("bert", "classify"), ("t5", "classify"))
    for name in TUNABLE
    if (name, task) != ("head", "generate")
]


@cache
def passes(family: str) -> Passes:
    return Passes(backbones.load(family, BACKBONES / family, torch.device("cpu"), torch.float32))


def example(task: Task, row: list[int], number: int) -> Example:
    return (
        Example(tokens=row, learn=[(2, len(row))])
        if task == "generate"
        else Example(tokens=row, label=number % 2)
    )


def job(name: str, family: str, task: Task) -> JobSpec:
    spec = passes(family).backbone.spec
    own = spec if task == "generate" else before_head(spec)
    chosen = {name: GIVEN.get(name, {})} | ({} if task == "generate" else {"head": GIVEN["head"]})
    specs = []
    for each, given in chosen.items():
        method = tunable(each)
        sites = method.sites(["mlp.down"] if each == "selective_module" else None, own)
        options = method.options(given, spec)
        specs.append(MethodSpec(method=each, options=options, targets=[site.name for site in sites]))
    return JobSpec(
        id="job",
        tenant="t",
        name=name,
        task=task,
        methods=specs,
        labels=["no", "yes"],
        epochs=2,
        batch_size=4,
    )


@pytest.mark.parametrize(("name", "family", "task"), CASES)
def test_a_method_trains(name: str, family: str, task: Task, tmp_path: Path) -> None:
    examples = [example(task, row, number) for number, row in enumerate(ROWS)]
    (tmp_path / "train.msgpack").write_bytes(msgspec.msgpack.encode(examples))
    shared = passes(family)
    weights = {key: tensor.clone() for key, tensor in shared.backbone.model.state_dict().items()}
    run = Run.open(job(name, family, task), tmp_path, shared)
    start = {key: parameter.detach().clone() for key, parameter in run.parameters.items()}
    trainer = Trainer(shared)
    trainer.add(run)
    messages = [message for _ in range(8) for message in trainer.step()]
    (finished,) = [message for message in messages if isinstance(message, Finished)]
    for key, parameter in run.parameters.items():
        assert not torch.equal(parameter, start[key]), key
    delta = native.load(Path(finished.file))
    methods.check(delta, shared.backbone.spec)
    methods.check_values(delta, shared.backbone.spec)
    assert methods.lower(delta, shared.backbone.spec, weights.get)
    for key, tensor in shared.backbone.model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
