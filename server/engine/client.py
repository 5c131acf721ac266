"""The only door to the engine: starts and supervises its process, and speaks to it for the api process.

If the engine dies, every running request ends in :class:`EngineRestarting` at once and a new process is started,
with a growing pause if it keeps dying. Deltas come back by themselves: requests carry where their delta lies.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

import msgspec
import structlog

from server.config import Settings
from server.engine.messages import (
    Cancel,
    Drop,
    Encode,
    Encoded,
    Failed,
    Fatal,
    Load,
    Loaded,
    Pin,
    Place,
    Progress,
    Ready,
    Reply,
    Request,
    Resides,
    Stats,
    Step,
    Submit,
    Where,
)
from server.engine.process import EngineConfig
from server.engine.wire import ParentSide, start_child
from server.errors import (
    Conflict,
    ContextTooLong,
    DeltaRefused,
    DeltaserveError,
    EngineRestarting,
    InvalidComposition,
    InvalidRequest,
    Quarantined,
    QueueTimeout,
    RowFailed,
    Unavailable,
    UnsupportedTask,
)
from server.types import (
    BackboneInfo,
    DeltaRef,
    EncoderInput,
    EngineStats,
    PinTier,
    ProbeResult,
    Residence,
    SamplingParams,
    Tier,
    TokenEvent,
    Turn,
    Vector,
    Want,
)

log = structlog.get_logger(__name__)

ERRORS: dict[str, type[DeltaserveError]] = {
    cls.code: cls
    for cls in (
        Conflict,
        ContextTooLong,
        DeltaRefused,
        InvalidComposition,
        InvalidRequest,
        Quarantined,
        QueueTimeout,
        RowFailed,
        Unavailable,
        UnsupportedTask,
    )
}
STOP_SECONDS = 5.0
LONGEST_PAUSE = 30.0
MOST_FAILED_STARTS = 5  # then it is not going to work, and saying so is better than trying for ever

_Event = TokenEvent | Vector | ProbeResult | Residence | DeltaserveError
_Answer = TypeVar("_Answer", ProbeResult, Residence)


class EngineClient:
    """One engine process and the requests that run on it.

    ``weights`` is a descriptor of memory that it puts the backbone's weights into (``shared.py``).
    """

    def __init__(
        self, settings: Settings, *, ops_mode: str | None = None, weights: int | None = None
    ) -> None:
        self.weights = weights
        self._config = EngineConfig(
            ops_mode=ops_mode,
            data_dir=str(settings.data_dir),
            **{
                name: getattr(settings, name)
                for name in EngineConfig.__struct_fields__
                if name not in ("data_dir", "ops_mode")
            },
        )
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[_Event]] = {}
        self._side: ParentSide[Reply, Request] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._reason = "the engine has not been started"
        self.info: BackboneInfo | None = None
        self.fatal: str | None = None
        self.restarts = 0
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.on_ready: Callable[[], None] | None = None  # each time that a process is

    async def start(self) -> None:
        """Starts the process and its supervision; returns at once. :meth:`wait_ready` waits."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self) -> None:
        """Ends the process. Running requests end in an error: drain first."""
        self._reason = "the server is stopping"
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._supervisor = None

    async def wait_ready(self) -> BackboneInfo:
        """Waits until the backbone is resident. Raises :class:`Unavailable` if it never will be."""
        await self._ready.wait()
        if self.fatal is not None or self.info is None:
            raise Unavailable(self.fatal or self._reason)
        return self.info

    @property
    def not_ready(self) -> str | None:
        """Why requests cannot run now, or None when they can."""
        return None if self._side is not None and self._ready.is_set() and not self.fatal else self._reason

    @property
    def pid(self) -> int | None:
        """Of the engine process, while there is one."""
        return None if self._process is None else self._process.pid

    async def generate(
        self,
        *,
        prompt: list[int],
        sampling: SamplingParams,
        delta: DeltaRef | None,
        turn: Turn,
        source: Sequence[int] = (),
    ) -> AsyncGenerator[TokenEvent, None]:
        """Runs one row. Closing the generator frees it; every other end is a finish reason or an exception.

        ``source`` is what an encoder-decoder's encoder reads.
        """
        async with self._conversation() as (request_id, side, events):
            side.send(
                Submit(
                    request_id, turn.tenant, prompt, delta, sampling, list(source), turn.weight, turn.priority
                )
            )
            ended = False
            try:
                while not ended:
                    event = await events.get()
                    if isinstance(event, DeltaserveError):
                        ended = True
                        raise event
                    if isinstance(event, TokenEvent):
                        ended = event.finish_reason is not None
                        yield event
            finally:
                if not ended:
                    side.send(Cancel(request_id))

    async def score(
        self,
        *,
        prompt: list[int],
        choices: Sequence[list[int]],
        delta: DeltaRef | None,
        turn: Turn,
        source: Sequence[int] = (),
    ) -> list[list[float]]:
        """The log-probability of every token of each choice behind ``prompt``. Raises the first error."""
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(prompt))

        async def one(choice: list[int]) -> list[float]:
            found: list[float] = []
            rows = self.generate(
                prompt=[*prompt, *choice], sampling=sampling, delta=delta, turn=turn, source=source
            )
            async with contextlib.aclosing(rows) as events:
                async for event in events:
                    found += [token.logprob for token in event.prompt_logprobs or [] if token is not None]
            return found

        tasks = [asyncio.create_task(one(choice)) for choice in choices]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def encode(
        self, *, rows: Sequence[EncoderInput], delta: DeltaRef | None, want: Want, turn: Turn
    ) -> list[Vector | DeltaserveError]:
        """Puts rows through an encoder: what each became, or its own error, in order.

        If the caller is cancelled, no row goes on.
        """
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(self._conversation()) for _ in rows]
            if not opened:
                return []
            side = opened[0][1]
            numbered = [(found[0], row) for found, row in zip(opened, rows, strict=True)]
            side.send(Encode(turn.tenant, numbered, delta, want, turn.weight, turn.priority))
            found: list[Vector | DeltaserveError] = []
            try:
                for _, _, events in opened:
                    while not isinstance(event := await events.get(), Vector | DeltaserveError):
                        pass
                    found.append(event)
            finally:
                for request_id, _ in numbered[len(found) :]:
                    side.send(Cancel(request_id))
            return found

    async def load(self, delta: DeltaRef) -> ProbeResult:
        """Brings a delta to the device now and says what it does there.

        Raises :class:`DeltaRefused` if it cannot be there, :class:`InvalidComposition` for a sum of good deltas.
        """
        return await self._ask(lambda request_id: Load(request_id, delta), ProbeResult)

    async def place(self, delta: DeltaRef, tier: Tier, pin: PinTier | None) -> Residence:
        """Brings a delta to a tier now, and keeps it from now on where ``pin`` says (None: nowhere). Where it is then.

        Raises :class:`Conflict` if there is no room for it or for its pin, :class:`DeltaRefused` if it cannot be there.
        """
        return await self._ask(lambda request_id: Place(request_id, delta, tier, pin), Residence)

    async def where(self, digest: str) -> Residence:
        """Which tier a delta is in."""
        return await self._ask(lambda request_id: Where(request_id, digest), Residence)

    def pin(self, digest: str, tier: PinTier | None) -> None:
        """Keeps a delta in this tier from now on if it is there, or lets it go."""
        if self._side is not None:
            self._side.send(Pin(digest, tier))

    def drop(self, digest: str) -> None:
        """Forgets a delta, and every sum it is part of, in every tier, once its running rows are done."""
        if self._side is not None:
            self._side.send(Drop(digest))

    async def _ask(self, request: Callable[[int], Request], answer: type[_Answer]) -> _Answer:
        async with self._conversation() as (request_id, side, events):
            side.send(request(request_id))
            while not isinstance(event := await events.get(), answer):
                if isinstance(event, DeltaserveError):
                    raise event
            return event

    @contextlib.asynccontextmanager
    async def _conversation(
        self,
    ) -> AsyncGenerator[tuple[int, ParentSide[Reply, Request], asyncio.Queue[_Event]], None]:
        side = self._side
        if side is None or self.not_ready is not None:
            raise EngineRestarting(self._reason)
        request_id = next(self._ids)
        events: asyncio.Queue[_Event] = asyncio.Queue()
        self._waiting[request_id] = events
        try:
            yield request_id, side, events
        finally:
            self._waiting.pop(request_id, None)

    # -- supervision -------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        pause, failures = 0.0, 0
        while self.fatal is None:
            try:
                was_ready = await self._run_once()
            finally:
                await self._end_process()
            pause = 0.0 if was_ready else min(LONGEST_PAUSE, pause * 2 or 1.0)
            failures = 0 if was_ready else failures + 1
            if self.info is None and failures == MOST_FAILED_STARTS:
                self.fatal = self._reason = (
                    f"the engine died {failures} times while starting; see its messages"
                )
                self._ready.set()
            if self.fatal is None:
                self.restarts += 1
                log.error("engine died", restarts=self.restarts, restarting_in=pause)
                await asyncio.sleep(pause)

    async def _run_once(self) -> bool:
        """Starts a process and serves its messages until it is gone. Was it ever ready?"""
        self._reason = "the engine is starting"
        shared = [] if self.weights is None else [self.weights]
        self._process, side = await start_child(
            "server.engine.process",
            [msgspec.json.encode(self._config).decode(), *map(str, shared)],
            Reply,
            shared,
        )
        try:
            while (reply := await side.receive()) is not None:
                if isinstance(reply, Ready):
                    self.info, self._side = reply.info, side
                    self._ready.set()
                    if self.on_ready is not None:
                        self.on_ready()
                else:
                    self._take(reply)
            return self._side is not None
        finally:
            await side.close()

    def _take(self, reply: Reply) -> None:
        match reply:
            case Step(events):
                for request_id, event in events:
                    if (queue := self._waiting.get(request_id)) is not None:
                        queue.put_nowait(event)
            case Encoded(vectors):
                for request_id, vector in vectors:
                    if (queue := self._waiting.get(request_id)) is not None:
                        queue.put_nowait(vector)
            case Failed(request_id, code, message):
                if (queue := self._waiting.get(request_id)) is not None:
                    queue.put_nowait(ERRORS.get(code, RowFailed)(message))
            case Loaded(request_id, result) | Resides(request_id, result):
                if (queue := self._waiting.get(request_id)) is not None:
                    queue.put_nowait(result)
            case Stats(stats):
                if self.on_stats is not None:
                    self.on_stats(stats)
            case Progress(reason):
                self._reason = f"the engine is starting: {reason}"
            case Fatal(message):
                self.fatal = self._reason = message
                self._ready.set()

    async def _end_process(self) -> None:
        self._side = None
        if self.fatal is None:
            self._ready.clear()
            self._reason = "the engine is restarting"
        for queue in self._waiting.values():
            queue.put_nowait(EngineRestarting("the engine stopped while it ran this request; send it again"))
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
