"""The server as a user starts it: the command in a process of its own, its children, and how to speak to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

COMMAND = [sys.executable, "-c", "from server.cli import main; main()", "serve"]
ROOT = Path(__file__).parents[2]
PAUSE = 0.01  # seconds between two looks

T = TypeVar("T")


def eventually(look: Callable[[], T], *, within: float, what: str) -> T:
    """The first truthy value of ``look``, which is called until then or for ``within`` seconds."""
    deadline = time.monotonic() + within
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(PAUSE)
    return found


class Child(NamedTuple):
    """A process, told from a later one with the same id by when it was started."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether it still runs; one that has ended and was not waited for does not."""
        found = _stat(self.pid)
        return found is not None and found[19] == self.started and found[0] not in "ZX"

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the state on; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


@dataclass
class Server:
    """A started command. ``data`` is its data folder; its output goes to files in ``logs``."""

    process: subprocess.Popen[bytes]
    data: Path
    logs: Path

    @property
    def url(self) -> str:
        """Where it listens, as it printed it."""
        found = eventually(
            lambda: re.search(r"deltaserve listens on (http://\S+)", self.output()) or self._ended(),
            within=60,
            what="an address",
        )
        return str(found[1])

    @property
    def key(self) -> str:
        """The admin key it made."""
        return (self.data / "admin.key").read_text().strip()

    def output(self) -> str:
        """What it has printed."""
        return (self.logs / "stdout").read_text()

    def log(self) -> str:
        """What it has logged."""
        return (self.logs / "stderr").read_text()

    def http(self, key: str | None = None, **arguments: Any) -> httpx.Client:
        """A client with ``key`` or the admin key."""
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.Client(**{"base_url": self.url, "headers": headers, "timeout": 60, **arguments})

    def wait_ready(self, within: float = 120) -> None:
        """Until ``/health/ready`` says so."""
        with httpx.Client(base_url=self.url, timeout=10) as http:

            def look() -> bool:
                self._ended()
                try:
                    return http.get("/health/ready").status_code == 200
                except httpx.TransportError:
                    return False

            eventually(look, within=within, what="readiness")

    def child(self, program: str) -> Child | None:
        """The child process with ``program`` in its command line; None while there is none."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            stat = _stat(int(entry.name))
            if stat is None or int(stat[1]) != self.process.pid or stat[0] in "ZX":
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if program in command:
                return Child(int(entry.name), stat[19])
        return None

    @property
    def engine(self) -> Child:
        """The engine process, once there is one."""
        return eventually(lambda: self.child("server.engine.process"), within=30, what="an engine process")

    @property
    def valkey(self) -> Child:
        """The embedded Valkey, once there is one."""
        return eventually(lambda: self.child("valkey-server"), within=30, what="a Valkey process")

    def terminate(self, within: float = 30) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def kill(self) -> None:
        """SIGKILL to the server alone; its children must see by themselves that it is gone."""
        self.process.kill()
        self.process.wait(10)

    def _ended(self) -> None:
        code = self.process.poll()
        assert code is None, f"the server ended with {code}:\n{self.log()[-2000:]}"


@contextmanager
def serving(data: Path, *flags: str, wait: bool = True) -> Iterator[Server]:
    """The command over a data folder, on a free port; ready unless ``wait`` is False. Killed at the end."""
    logs = data.parent / f"{data.name}-logs"
    logs.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DELTASERVE_")}
    with (logs / "stdout").open("wb") as out, (logs / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [*COMMAND, "--port", "0", "--data-dir", str(data), *flags],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=err,
        )
    server = Server(process, data, logs)
    try:
        if wait:
            server.wait_ready()
        yield server
    finally:
        process.kill()
        process.wait(10)
