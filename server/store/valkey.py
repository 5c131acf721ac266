"""The embedded Valkey: the registry of a server that was given no ``--redis-url``.

Every write is fsynced before it is answered (``appendfsync always``), so what was acknowledged survives a
kill -9 of either process. It listens on a unix socket only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from urllib.parse import quote

from server.store.durable import make_folder, replace_file
from server.store.folder_lock import lock_after_ending_holders, try_lock, unlock
from server.store.valkey_child import ValkeyChild
from server.store.valkey_config import configuration, socket_path

log = logging.getLogger(__name__)

_LARGEST_LOG = 1 << 20  # bytes; a longer one is begun anew at start
_ORPHAN_SECONDS = 10.0
_RESTARTS = 5
_LONGEST_PAUSE = 2.0


class EmbeddedValkeyError(OSError):
    """The embedded Valkey cannot start; the message says why and what to do."""


class DataFolderInUseError(EmbeddedValkeyError):
    """Another server works on the same data folder."""


class EmbeddedValkey:
    """A Valkey server over ``folder``, as a supervised child process.

    It ends when this process does, even by SIGKILL, and ``start`` ends one that was left behind all the same.
    Not for use by several event loops at the same time.
    """

    def __init__(self, folder: Path, *, start_seconds: float = 30.0, stop_seconds: float = 10.0) -> None:
        self.folder = folder.resolve()
        self._start_seconds = start_seconds
        self._stop_seconds = stop_seconds
        self._child: ValkeyChild | None = None
        self._folder_lock: int | None = None
        self._socket: Path | None = None
        self._stopping = asyncio.Event()
        self._changing = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Of the Valkey process, None before the first start."""
        return None if self._child is None else self._child.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive now."""
        return self._child is not None and self._child.returncode is None

    @property
    def url(self) -> str:
        """Where clients connect; the same after each restart. Raises RuntimeError before the first start."""
        if self._socket is None:
            raise RuntimeError("the embedded Valkey has not been started")
        return f"unix://{quote(str(self._socket))}"

    async def start(self) -> str:
        """Start Valkey, or start it again after it died, and return its URL once it answers.

        Nothing happens when it is running. Raises DataFolderInUseError when another server has the folder,
        and EmbeddedValkeyError with the last lines of Valkey's log when it does not come up.
        """
        self._stopping.clear()
        async with self._changing:
            if not self.running:
                await self._start()
        return self.url

    async def stop(self) -> None:
        """End Valkey (SIGTERM, then SIGKILL after ``stop_seconds``) and free the folder.

        Harmless when it is not running.
        """
        self._stopping.set()
        async with self._changing:
            try:
                if self._child is not None and self.running:
                    await self._child.end(self._stop_seconds)
            finally:
                self._release()

    async def wait(self) -> int:
        """Return when the process has ended, with its return code (-N: by signal N)."""
        if self._child is None:
            raise RuntimeError("the embedded Valkey has not been started")
        return await self._child.wait()

    async def supervise(self) -> None:
        """Start Valkey again whenever it ends by itself; returns after ``stop``. For a task of the app.

        Raises OSError when it could not be brought back several times in a row.
        """
        pause = 0.0
        failures = 0
        while True:
            began = time.monotonic()
            code = await self.wait()
            if self._stopping.is_set():
                return
            log.error("the embedded Valkey ended with code %d; it is started again", code)
            # One that dies young is not restarted at full speed.
            lived = time.monotonic() - began
            pause = 0.0 if lived > _LONGEST_PAUSE else min(2 * pause + 0.05, _LONGEST_PAUSE)
            await asyncio.sleep(pause)
            try:
                async with self._changing:
                    if self._stopping.is_set():
                        return
                    await self._start()
                failures = 0
            except OSError:
                failures += 1
                if failures == _RESTARTS:
                    raise
                log.exception("the embedded Valkey did not come back")

    async def _start(self) -> None:
        make_folder(self.folder)
        if self._folder_lock is None:
            self._folder_lock = try_lock(self.folder / "server.lock")
            if self._folder_lock is None:
                raise DataFolderInUseError(
                    f"another server is running on {self.folder}: stop it, or give another --data-dir"
                )
        try:
            await self._spawn()
        except BaseException:
            if self._child is not None and self.running:
                await asyncio.shield(self._child.end(timeout=0))
            self._release()
            raise

    async def _spawn(self) -> None:
        self._socket = socket_path(self.folder)
        config = self.folder / "valkey.conf"
        log_path = self.folder / "valkey.log"
        with contextlib.ExitStack() as closing:
            # The child inherits this lock: it is held exactly as long as any Valkey works on the folder.
            held = await lock_after_ending_holders(self.folder / "valkey.lock", _ORPHAN_SECONDS)
            if held is None:
                raise EmbeddedValkeyError(
                    f"a Valkey of an earlier server still works on {self.folder}: end it"
                )
            closing.callback(os.close, held)
            self._socket.unlink(missing_ok=True)
            replace_file(config, configuration(self.folder, self._socket))
            output = _open_log(log_path)
            closing.callback(os.close, output)
            log_start = os.fstat(output).st_size
            try:
                self._child = await ValkeyChild.spawn(config, output, held)
            except OSError as error:
                raise EmbeddedValkeyError(f"Valkey cannot be started: {error}") from error
        await self._until_ready(self._child, self._socket, log_path, log_start)

    async def _until_ready(self, child: ValkeyChild, socket: Path, log_path: Path, log_start: int) -> None:
        """Poll until Valkey answers. Loading a large file may take as long as it takes."""
        deadline = time.monotonic() + self._start_seconds
        while (answer := await _ping(socket)) != b"+PONG\r\n":
            if child.returncode is not None:
                said = _tail(log_path, log_start)
                raise EmbeddedValkeyError(f"Valkey ended with code {child.returncode} at start:\n{said}")
            if answer.startswith(b"-LOADING"):
                deadline = time.monotonic() + self._start_seconds
            elif time.monotonic() > deadline:
                said = _tail(log_path, log_start)
                raise EmbeddedValkeyError(f"Valkey did not answer in {self._start_seconds:g} s:\n{said}")
            await asyncio.sleep(0.005)

    def _release(self) -> None:
        """Remove the socket and free the folder."""
        if self._folder_lock is None:
            return  # What lies there is another server's.
        if self._socket is not None and not self.running:
            self._socket.unlink(missing_ok=True)
            if self._socket.parent != self.folder:
                with contextlib.suppress(OSError):
                    self._socket.parent.rmdir()
        unlock(self._folder_lock)
        self._folder_lock = None


def _open_log(path: Path) -> int:
    too_long = path.exists() and path.stat().st_size > _LARGEST_LOG
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if too_long else 0)
    return os.open(path, flags, 0o600)


def _tail(path: Path, start: int) -> str:
    """The last lines written to the log since ``start``."""
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-5:])


async def _ping(socket: Path) -> bytes:
    """Valkey's answer to PING; empty when it does not listen yet."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except (FileNotFoundError, ConnectionRefusedError):
        return b""
    try:
        writer.write(b"PING\r\n")
        async with asyncio.timeout(5):
            return await reader.readline()
    except (TimeoutError, ConnectionError):
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
