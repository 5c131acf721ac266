"""Commands that must not hold up the rest: each in a process group of its own, which has a limit of time.

A rival may fail, or take for ever; then that is its result, and everything it started is ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NoReturn

GRACE_S = 20.0  # from asking a group to end to ending it
LINE = 160  # characters of an error's last line


@contextmanager
def group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group of its own (``options``: Popen's). Nothing of the group is left afterwards."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)


def run(command: Sequence[str], limit_s: float, **options: Any) -> str | None:
    """Runs a command (``options``: Popen's); what went wrong, or None."""
    with group(command, **options) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"did not finish in {limit_s:g} s"
    return f"ended with {code}" if code else None


def result_of(command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """The JSON object after ``RESULT`` in what a command prints; else what went wrong as ``failed``, and how its output
    ended."""
    with TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        with out.open("wb") as output, err.open("wb") as errors:
            failed = run(command, limit_s, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        printed, said = (path.read_text(errors="replace") for path in (out, err))
    results = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    if failed is None and results:
        found: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
        return found
    lines = [line.strip() for line in (said or printed).splitlines() if line.strip()]
    last = f": {lines[-1][:LINE]}" if lines else ""
    return {"failed": (failed or "printed no result") + last, "output": (printed + said)[-3000:]}


def leave_when_asked() -> None:
    """From now on SIGTERM ends this process as an exception does: its own groups end with it."""

    def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
