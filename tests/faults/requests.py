"""What the tests of faults ask of a server: uploads, answers, and streams that are watched while they run."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.api.command import Server, eventually

BACKBONE = "tiny"
POSITIONS = 4096
LONG = 3500  # tokens: seconds, whatever the machine


def upload(http: httpx.Client, name: str, file: Path) -> httpx.Response:
    """Push a native file."""
    return http.post(
        "/v1/deltas", data={"name": name}, files={"file": ("delta.safetensors", file.read_bytes())}
    )


def body(model: str, tokens: int, **extra: Any) -> dict[str, Any]:
    """A greedy completion of exactly so many tokens."""
    common = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": model, "prompt": f"To {model}:", "max_tokens": tokens, **common, **extra}


@dataclass(frozen=True)
class Answer:
    """What a delta answered; equal answers are the same answer."""

    digest: str | None
    token_ids: tuple[int, ...]
    text: str


def answer(http: httpx.Client, model: str, tokens: int = 12) -> Answer:
    """Ask a model its prompt."""
    response = http.post("/v1/completions", json=body(model, tokens))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return Answer(response.headers.get("x-delta-digest"), tuple(choice["token_ids"]), choice["text"])


def metric(server: Server, name: str) -> float:
    """A gauge or counter without labels, or with exactly the ones in ``name``."""
    with server.http() as http:
        text = http.get("/metrics").text
    found = re.search(rf"^deltaserve_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def wait_for_rows(server: Server, count: int, within: float) -> None:
    """Until the engine computes so many rows."""
    eventually(
        lambda: metric(server, "requests_running") == count, within=within, what=f"{count} rows running"
    )


@dataclass
class Stream:
    """A streamed completion, as far as it has come."""

    status: int | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    cut: bool = False
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, http: httpx.AsyncClient, request: dict[str, Any]) -> None:
        """Read it to its end. ``begun`` is set at its first token, and at its end in any case."""
        try:
            async with http.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
                self.status, self.headers = response.status_code, response.headers
                if response.status_code != 200:
                    self.error = json.loads(await response.aread())["error"]
                    return
                async with aclosing(response.aiter_lines()) as lines:
                    async for line in lines:
                        self._take(line.removeprefix("data: "))
        except httpx.TransportError:
            self.cut = True
        finally:
            self.begun.set()

    def _take(self, event: str) -> None:
        if not event:
            return
        assert not self.done, "an event after [DONE]"
        if event == "[DONE]":
            self.done = True
            return
        data = json.loads(event)
        if "error" in data:
            self.error = data["error"]
            return
        assert self.error is None, "an event after the error"
        (choice,) = data["choices"]
        self.token_ids += choice["token_ids"]
        self.finish_reason = choice["finish_reason"]
        self.begun.set()


@dataclass
class Streams:
    """Streams that run at the same time, each in a task."""

    http: httpx.AsyncClient
    all: list[Stream] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, *requests: dict[str, Any], within: float = 30) -> list[Stream]:
        """Start streams and wait until each has begun."""
        streams = [Stream() for _ in requests]
        for stream, request in zip(streams, requests, strict=True):
            self.tasks.append(asyncio.create_task(stream.run(self.http, request)))
        self.all += streams
        async with asyncio.timeout(within):
            for stream in streams:
                await stream.begun.wait()
        return streams

    async def hang_up(self, stream: Stream) -> None:
        """Close a stream's connection as a client does that goes away."""
        task = self.tasks[self.all.index(stream)]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def ended(self, within: float) -> None:
        """Until all have ended."""
        async with asyncio.timeout(within):
            await asyncio.gather(*self.tasks)


@asynccontextmanager
async def streaming(server: Server) -> AsyncIterator[Streams]:
    """A client for streams; what still runs at the end is cancelled."""
    headers = {"authorization": f"Bearer {server.key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60, limits=limits) as http:
        streams = Streams(http)
        try:
            yield streams
        finally:
            for task in streams.tasks:
                task.cancel()
            await asyncio.gather(*streams.tasks, return_exceptions=True)
