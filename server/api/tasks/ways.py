"""What every way of running a task shares: the call it works for, errors that are one row's, and rows side by side."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from server.api.models import Target
from server.api.ports import Engine
from server.api.schemas import Prioritised
from server.api.services import Backbone
from server.engine.templates import Template
from server.errors import DeltaserveError, InvalidComposition, Unavailable, UnsupportedTask
from server.metrics import Metrics
from server.types import Turn

P = TypeVar("P", bound=Prioritised)
R = TypeVar("R")

Output = dict[str, Any]
Outcome = Output | DeltaserveError

# What is no row's fault: the server cannot take the call now, or the model is not made for it.
_OF_THE_CALL = (Unavailable, UnsupportedTask, InvalidComposition)


@dataclass
class Call:
    """One call of a task: what it runs on, for whom, and the tokens that it used. ``started``: ``time.perf_counter()``."""

    engine: Engine
    metrics: Metrics
    backbone: Backbone
    turn: Turn
    target: Target
    started: float
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def usage(self) -> dict[str, int]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Way(ABC, Generic[P]):
    """One way of running a task, on one backbone. ``parameters`` is what its parameters must be."""

    template: Template
    parameters: type[P]

    async def check(self, backbone: Backbone, parameters: P) -> None:
        """Raises InvalidRequest for parameters, or a template, that this backbone can never take."""

    @abstractmethod
    async def run(self, call: Call, inputs: Sequence[Any], parameters: P) -> list[Outcome]:
        """One outcome for each input, in order. Raises what is no single row's fault."""


def of_the_row(error: DeltaserveError) -> DeltaserveError:
    """The error, if it is one row's own; else raises it."""
    if isinstance(error, _OF_THE_CALL):
        raise error
    return error


async def side_by_side(rows: Sequence[R], run: Callable[[R], Awaitable[Output]], most: int) -> list[Outcome]:
    """Each row's output or its own error, ``most`` rows at a time. If one's error is the call's, no row goes on."""
    gate = asyncio.Semaphore(most)

    async def one(row: R) -> Outcome:
        async with gate:
            try:
                return await run(row)
            except DeltaserveError as error:
                return of_the_row(error)

    running = [asyncio.create_task(one(row)) for row in rows]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
