"""What the tests of tuning share: tiny backbones with their hooks, rows, jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from deltas.tuned import tunable
from server.engine import backbone as backbones
from server.engine.backbone import Backbone
from server.tuning.forward import Passes
from server.tuning.messages import FromTuner
from server.tuning.run import Run
from server.tuning.spec import Example, JobSpec, MethodSpec, Task
from server.tuning.trainer import Trainer
from tests.oracle.padded import BACKBONES

WORDS = 56
LABELS = ["no", "yes", "so-so"]
SMALL: Mapping[str, Mapping[str, Any]] = {
    "compacter": {"pieces": 2},
    "prompt": {"length": 3},
    "prefix": {"length": 3},
    "diff_pruning": {"density": 0.1},
    "intrinsic": {"dimensions": 7},
}
"""Options where the defaults do not fit a tiny backbone."""


def load(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A tiny backbone of the fixtures, freshly loaded."""
    return backbones.load(family, BACKBONES / family, torch.device("cpu"), dtype)


def passes_of(family: str, dtype: torch.dtype = torch.float32) -> Passes:
    """A tiny backbone ready for jobs."""
    return Passes(load(family, dtype))


def method(
    passes: Passes, name: str, *, targets: Sequence[str] | None = None, **options: object
) -> MethodSpec:
    """A component of a job: usual targets and complete options."""
    spec, found = passes.backbone.spec, tunable(name)
    if targets is None and name == "selective_module":
        targets = ["norms", "mlp.down"]
    sites = found.sites(targets, spec)
    complete = found.options({**SMALL.get(name, {}), **options}, spec)
    return MethodSpec(method=name, options=complete, targets=[site.name for site in sites])


def head(passes: Passes, task: Task) -> MethodSpec:
    """The head of a task: three labels, or one number."""
    if task == "regress":
        return method(passes, "head", kind="regress", outputs=1)
    if task == "tag":
        return method(passes, "head", labels=LABELS, kind="tag", pooling="none")
    return method(passes, "head", labels=LABELS)


def examples(
    task: Task, count: int, seed: int = 0, *, longest: int = 12, kind: str = "decoder"
) -> list[Example]:
    """Rows that can be learned: what is to be said depends on the first token."""
    make = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=make))

    found = []
    for _ in range(count):
        tokens = [5 + draw(0, WORDS) for _ in range(draw(4, longest))]
        which = tokens[0] % 3
        answer = [5 + which, 8 + which]
        if task == "classify":
            found.append(Example(tokens, label=which))
        elif task == "regress":
            found.append(Example(tokens, label=float(which)))
        elif task == "tag":
            found.append(Example(tokens, label=[-100, *(token % 3 for token in tokens[1:])]))
        elif kind == "encoder-decoder":
            found.append(Example(tokens, target=answer))
        else:
            found.append(Example([*tokens, *answer], learn=[(len(tokens), len(tokens) + 2)]))
    return found


def job(folder: Path, methods: Sequence[MethodSpec], task: Task, rows: list[Example], **more: Any) -> JobSpec:
    """A job's spec, its rows in ``folder``; ``valid`` among ``more`` are those of its validation set."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.msgpack").write_bytes(msgspec.msgpack.encode(rows))
    if valid := more.pop("valid", None):
        (folder / "valid.msgpack").write_bytes(msgspec.msgpack.encode(valid))
    name = folder.name
    labels = LABELS if task in ("classify", "tag") else None
    settings = {"batch_size": 4, "epochs": 1, **more}
    return JobSpec(
        id=name, tenant="t", name=name, task=task, methods=list(methods), labels=labels, **settings
    )


def train(passes: Passes, *runs: Run, most: int | None = None) -> list[FromTuner]:
    """All runs together to their ends, or for so many steps at most; what came of it."""
    trainer = Trainer(passes)
    for run in runs:
        trainer.add(run)
    found: list[FromTuner] = []
    while trainer.runs and most != 0:
        found += trainer.step()
        most = None if most is None else most - 1
    return found


def digest_of(backbone: Backbone) -> str:
    """Of every byte of the backbone's weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
