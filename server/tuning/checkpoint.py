"""Checkpoints: folders ``step-N`` that are whole or not there, with the delta as it was and all that training goes on from.

``delta.safetensors`` is the delta in native form, ``state.safetensors`` the parameters, the optimizer's moments and the
random generator, ``state.json`` numbers, with the digest of the tensors' file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from deltas.delta import Delta
from deltas.formats import native
from server.store.durable import make_folder, sync_folder

DELTA, TENSORS, NUMBERS = "delta.safetensors", "state.safetensors", "state.json"
KEPT = 3  # newest ones, beside the best: the one before the newest may still be being published
_NAME = re.compile(r"step-(?P<step>[0-9]+)")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the delta; ``numbers`` is JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step}"


def write(checkpoints: Path, saved: Saved, delta: Delta) -> Path:
    """Writes a checkpoint and returns its delta's file. It is on disk when this returns, and never seen half."""
    make_folder(checkpoints)
    final = folder_of(checkpoints, saved.step)
    if final.is_dir() and _read(final) is not None:
        return final / DELTA  # resumed here: what is computed again is the same
    scratch = checkpoints / f".writing-{saved.step}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    native.save(delta, scratch / DELTA)
    tensors = safetensors.torch.save({name: tensor.contiguous() for name, tensor in saved.tensors.items()})
    (scratch / TENSORS).write_bytes(tensors)
    numbers = {"step": saved.step, "digest": hashlib.sha256(tensors).hexdigest(), **saved.numbers}
    (scratch / NUMBERS).write_text(json.dumps(numbers))
    for path in scratch.iterdir():
        _sync(path)
    sync_folder(scratch)
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    sync_folder(checkpoints)
    return final / DELTA


def newest(checkpoints: Path) -> Saved | None:
    """The newest checkpoint that is whole, if there is one."""
    for _, folder in sorted(_all(checkpoints), reverse=True):
        saved = _read(folder)
        if saved is not None:
            return saved
    return None


def prune(checkpoints: Path, best: int | None) -> None:
    """Removes what an earlier process left half written, and all checkpoints but the newest and that of step ``best``."""
    for scratch in checkpoints.glob(".writing-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    for step, folder in sorted(_all(checkpoints), reverse=True)[KEPT:]:
        if step != best:
            shutil.rmtree(folder)


def _all(checkpoints: Path) -> list[tuple[int, Path]]:
    found = [(_NAME.fullmatch(path.name), path) for path in checkpoints.glob("step-*")]
    return [(int(match["step"]), path) for match, path in found if match is not None]


def _read(folder: Path) -> Saved | None:
    """None for one that is damaged."""
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        content = (folder / TENSORS).read_bytes()
        native.load(folder / DELTA)
    except (OSError, ValueError):
        return None
    if numbers.pop("digest", None) != hashlib.sha256(content).hexdigest():
        return None
    return Saved(int(numbers.pop("step")), safetensors.torch.load(content), numbers)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
