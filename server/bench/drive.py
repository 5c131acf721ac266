"""Sends a plan's requests: in a closed loop (so many at a time) or an open one (when they are due)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

import httpx

from server.bench.ask import Outcome, ask
from server.bench.plan import Request

_Load = Callable[[asyncio.TaskGroup], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """When no more are sent: after so many ``requests``, after so many ``seconds``, whichever comes first.

    What was sent is waited for, each request at most ``timeout`` seconds.
    """

    requests: int | None
    seconds: float | None
    timeout: float


@dataclass
class Run:
    """What was done: ``started`` counts requests when they are sent, ``outcomes`` grows when they end."""

    started: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    """From the start until the last request ended."""
    interrupted: bool = False


def connect(url: str, key: str) -> httpx.AsyncClient:
    """A client without limits of its own: as many connections as there are requests, and no time-out."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=None,  # noqa: S113  # `ask` has a limit for the whole request
    )


async def closed_loop(
    http: httpx.AsyncClient, requests: Iterator[Request], concurrency: int, limits: Limits
) -> Run:
    """``concurrency`` requests at a time: one is sent when another ends. Cancelling it cancels them and ends the run."""
    driver = _Driver(http, limits)

    async def worker() -> None:
        while driver.more(driver.elapsed()):
            driver.begun += 1
            await driver.one(next(requests))

    async def load(group: asyncio.TaskGroup) -> None:
        for _ in range(concurrency):
            group.create_task(worker())

    return await driver.run(load)


async def open_loop(
    http: httpx.AsyncClient, requests: Iterator[Request], arrivals: Iterator[float], limits: Limits
) -> Run:
    """Each request when it is due (``arrivals``, seconds from the start), however many run. Cancelling is as above."""
    driver = _Driver(http, limits)

    async def load(group: asyncio.TaskGroup) -> None:
        for due, request in zip(arrivals, requests, strict=False):
            if not driver.more(due):
                return
            driver.begun += 1
            await asyncio.sleep(due - driver.elapsed())  # not at all, where it is late already
            group.create_task(driver.one(request, due))

    return await driver.run(load)


class _Driver:
    """One run under way."""

    def __init__(self, http: httpx.AsyncClient, limits: Limits) -> None:
        self._http = http
        self._limits = limits
        self._run = Run()
        self._start = perf_counter()
        self.begun = 0

    def elapsed(self) -> float:
        return perf_counter() - self._start

    def more(self, seconds: float) -> bool:
        """Whether another request may be sent at ``seconds`` from the start."""
        requests, most = self._limits.requests, self._limits.seconds
        return (requests is None or self.begun < requests) and (most is None or seconds < most)

    async def one(self, request: Request, due: float | None = None) -> None:
        """Send one and keep what came of it, whatever that is."""
        sent = perf_counter()
        late = None if due is None else sent - self._start - due
        outcome = Outcome(request, sent, late)
        self._run.started += 1
        try:
            await ask(self._http, outcome, self._limits.timeout)
        finally:
            self._run.outcomes.append(outcome)

    async def run(self, load: _Load) -> Run:
        """The load to its end, or until this task is cancelled: then what runs is cancelled, and kept too."""
        try:
            async with asyncio.TaskGroup() as group:
                await load(group)
        except asyncio.CancelledError:
            self._run.interrupted = True
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
        self._run.seconds = self.elapsed()
        return self._run
