"""Pickled tensor files, turned into safetensors by a child process. No byte of them is looked at in this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from deltas.errors import InvalidDelta
from deltas.formats import pickled_child
from deltas.formats.header import MAX_NAME, MAX_TENSORS
from deltas.formats.pickled_child import READY, REFUSED, Job

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_CHILD = str(Path(pickled_child.__file__).resolve())
_READY = f"{READY}\n".encode()
_MAX_REPORT = 400  # bytes
_ADVICE = (
    "save the delta again as safetensors "
    "(PEFT: the default of save_pretrained; AdapterHub: save_adapter(..., use_safetensors=True); OpenDelta: the same "
    "tensors in a file model.safetensors)"
)
# Every child may take its memory: few at a time, the others wait.
_TURNS = threading.BoundedSemaphore(2)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a conversion may take."""

    seconds: float = 120.0
    """From start to end, with the seconds that importing torch takes."""
    cpu_seconds: int = 60
    """Of computing, after that import."""
    memory: int = 512 << 20
    """Bytes of address space beside twice the file's size."""


def convert(path: Path, name: str, folder: Path, limits: Limits | None = None) -> Path:
    """A safetensors file in ``folder`` with the tensors of the pickled file at ``path``, called ``name``.

    ``folder`` must be empty and of no other use: the child works in it. Blocks for seconds. Raises
    :class:`InvalidDelta` for anything but a flat dict of dense float tensors, and RuntimeError where a child
    cannot be started at all.
    """
    limits = limits or Limits()
    target = folder.resolve() / "tensors.safetensors"
    job = Job(
        source=str(path.resolve(strict=True)),
        target=str(target),
        parent=os.getpid(),
        memory=limits.memory,
        cpu_seconds=limits.cpu_seconds,
        max_tensors=MAX_TENSORS,
        max_name=MAX_NAME,
    )
    with _TURNS:
        code = _run([sys.executable, "-I", "-B", _CHILD, json.dumps(asdict(job))], folder, limits.seconds)
    # Files, not pipes: the limit on the size of the child's files bounds what it can say.
    with (folder / "report").open("rb") as file:
        report = file.read(_MAX_REPORT)
    if code is not None and not report.startswith(_READY):
        log = (folder / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the process that converts pickled files failed to start ({code}): {log}")
    if code != 0:
        raise InvalidDelta(f"{name} {_problem(code, report, limits)}; {_ADVICE}", field=name)
    return target


def _run(command: list[str], folder: Path, seconds: float) -> int | None:
    """The exit status, as ``subprocess`` has it; None for a child that had to be killed."""
    with (folder / "report").open("xb") as report, (folder / "log").open("xb") as log:
        # The calling thread waits for the child, which Linux would kill when that thread ended.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=report,
            stderr=log,
            cwd=folder,
            env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder.resolve())},
            start_new_session=True,
        )
    with process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def _problem(code: int | None, report: bytes, limits: Limits) -> str:
    if code is None:
        return f"takes more than {limits.seconds:g} seconds to convert"
    if code == -signal.SIGXCPU:
        return f"takes more than {limits.cpu_seconds} seconds of computing to convert"
    if code == -signal.SIGKILL:
        return "takes more memory or time to convert than there is"
    if code == REFUSED:
        text = report.removeprefix(_READY).decode("ascii", "replace").strip()
        return "".join(character for character in text if character.isprintable())
    return "is damaged, or is not a dict of tensors that torch.save wrote"
