"""The only door to the tuner: starts its process when there is a job, and ends it when there has been none for a while."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import msgspec
import structlog

from server.config import Settings
from server.engine.wire import ParentSide, start_child
from server.tuning.messages import (
    Failed,
    Finished,
    FromTuner,
    Leave,
    Load,
    Start,
    Stop,
    Stopped,
    ToTuner,
    TunerDied,
)
from server.tuning.process import TunerConfig
from server.tuning.spec import JobSpec
from server.tuning.tuner import OpenTuner
from server.types import BackboneInfo

log = structlog.get_logger(__name__)

IDLE_SECONDS = 60.0
LEAVE_SECONDS = 30.0


@dataclass(eq=False)
class _Child:
    """One process and the jobs that it has not done yet."""

    process: asyncio.subprocess.Process
    side: ParentSide[FromTuner, ToTuner]
    jobs: set[str] = field(default_factory=set)
    reader: asyncio.Task[None] | None = None


class TunerClient:
    """One tuner process at most, and the jobs that it trains.

    ``weights`` is the descriptor of the memory that holds the engine's weights; jobs may be started once it does.
    A process that dies is not started again by itself: :class:`TunerDied` names its jobs, and the next
    :meth:`start` makes a new one.
    """

    def __init__(self, settings: Settings, weights: int) -> None:
        self._config = TunerConfig(
            priority=settings.tuning_priority,
            threads=settings.tuning_threads,
            share=settings.tuning_share,
        )
        self._weights = weights
        self._child: _Child | None = None
        self._starting = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._rows = 0
        self._queue: asyncio.Queue[FromTuner | TunerDied] = asyncio.Queue()

    @property
    def pid(self) -> int | None:
        """Of the tuner process, while there is one."""
        return None if self._child is None else self._child.process.pid

    async def start(self, spec: JobSpec, folder: str) -> None:
        """Trains a job whose data are in ``folder``, from its newest checkpoint there if it has one."""
        async with self._starting:
            self._stay()
            child = self._child or await self._spawn()
            child.jobs.add(spec.id)
        child.side.send(Start(spec, folder))

    async def stop(self, job: str, *, keep: bool) -> None:
        """Ends a job after the step in progress, with a checkpoint or without; ``Stopped`` says when it has."""
        if self._child is not None:
            self._child.side.send(Stop(job, keep))

    def load(self, rows: int) -> None:
        """Tells how many rows the engine has to compute; a duty cycle goes by whether there are any."""
        if self._child is not None and bool(rows) != bool(self._rows):
            self._child.side.send(Load(rows))
        self._rows = rows

    async def messages(self) -> AsyncIterator[FromTuner | TunerDied]:
        """Everything that the tuner says, and its deaths, for ever. For one reader."""
        while True:
            yield await self._queue.get()

    async def close(self) -> None:
        """Every job writes a checkpoint, then the process ends; it is killed if that takes too long."""
        self._stay()
        child, self._child = self._child, None
        if child is None or child.reader is None:
            return
        child.side.send(Leave())
        try:
            await asyncio.wait_for(asyncio.shield(child.reader), LEAVE_SECONDS)
        except TimeoutError:
            log.warning("tuner_killed", reason="its checkpoints took too long")
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
            await child.reader

    async def _spawn(self) -> _Child:
        process, side = await start_child(
            "server.tuning.process",
            [msgspec.json.encode(self._config).decode(), str(self._weights)],
            FromTuner,
            [self._weights],
        )
        child = self._child = _Child(process, side)
        child.reader = asyncio.create_task(self._listen(child), name="tuner")
        if self._rows:
            side.send(Load(self._rows))
        return child

    async def _listen(self, child: _Child) -> None:
        while (message := await child.side.receive()) is not None:
            if isinstance(message, Finished | Failed | Stopped):
                child.jobs.discard(message.job)
                self._leave_when_idle()
            self._queue.put_nowait(message)
        if self._child is child:
            self._child = None
        await child.side.close()  # the process leaves when it sees that
        code = await child.process.wait()
        if child.jobs:
            self._queue.put_nowait(TunerDied(sorted(child.jobs), _why(code)))

    def _leave_when_idle(self) -> None:
        self._stay()
        if self._child is not None and not self._child.jobs:
            self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._leave)

    def _leave(self) -> None:
        child = self._child
        if child is not None and not child.jobs:
            child.side.send(Leave())
            self._child = None  # the next job gets a process of its own

    def _stay(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None


def opener(weights: int) -> OpenTuner:
    """Opens clients of a tuner on the weights in the memory ``weights``."""

    @contextlib.asynccontextmanager
    async def opened(settings: Settings, _info: BackboneInfo) -> AsyncGenerator[TunerClient, None]:
        client = TunerClient(settings, weights)
        try:
            yield client
        finally:
            await client.close()

    return opened


def _why(code: int) -> str:
    if code == -signal.SIGKILL:
        return "it was killed, which is what the system does when memory runs out"
    if code < 0:
        return f"it died of signal {-code}"
    return f"it ended with status {code}; the server's log says why"
