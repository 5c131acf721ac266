"""A job's folder: encoded data and checkpoints for the tuner, and what the api process keeps beside them.

    train.msgpack, valid.msgpack   the data (written at submission)
    checkpoints/                   the tuner's own
    served/step-N.safetensors      checkpoints' deltas, for as long as the job is known
    metrics.jsonl                  see server.tuning.curves
    finished.msgpack               the tuner's last word, while its delta is being published

Everything here blocks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from server.store.durable import make_folder, replace_file, sync_folder
from server.tuning.messages import Finished

SERVED = "served"
_FINISHED = "finished.msgpack"


def serve(folder: Path, file: Path, step: int) -> str:
    """Keep a checkpoint's delta where nothing prunes it; its name relative to ``folder``. Durable on return."""
    name = f"{SERVED}/step-{step}.safetensors"
    path = folder / name
    make_folder(path.parent)
    link = path.with_suffix(".tmp")
    link.unlink(missing_ok=True)
    os.link(file, link)  # the tuner writes a checkpoint once and never again
    link.replace(path)
    sync_folder(path.parent)
    return name


def unserve(folder: Path, steps: Iterable[int]) -> None:
    """Let go of checkpoints that are kept no longer."""
    for step in steps:
        (folder / SERVED / f"step-{step}.safetensors").unlink(missing_ok=True)


def note_finished(folder: Path, message: Finished) -> None:
    """Remember that training ended, so that a crash before it is published does not train again. Durable on return."""
    replace_file(folder / _FINISHED, msgspec.msgpack.encode(message))


def finished(folder: Path) -> Finished | None:
    """The tuner's last word, if it was heard."""
    with contextlib.suppress(FileNotFoundError):
        return msgspec.msgpack.decode((folder / _FINISHED).read_bytes(), type=Finished)
    return None


def clear(folder: Path) -> None:
    """Remove all but the served checkpoints: the job has ended."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name == SERVED:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove all of it: the job is forgotten."""
    shutil.rmtree(folder, ignore_errors=True)
