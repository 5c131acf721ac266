"""Work that lasts no longer than its client's connection: a closed connection ends it, whatever kind of
answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server import logging
from server.api.services import ServerState
from server.errors import DeltaserveError, QueueTimeout, Unavailable

log = logging.get("server.api")

T = TypeVar("T")

_HALTED = "The server is shutting down; this request did not finish in time."


async def while_connected(request: Request, state: ServerState, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client goes or the drain's time is up.

    To be called once the body has been read. Raises ``ClientDisconnect`` or ``Unavailable`` then.
    """
    task = asyncio.ensure_future(work)
    ended = await _watch(task, request.receive, state)
    if ended is not None:
        raise ended
    return task.result()


class EventStream(Response):
    """Server-sent events from an async generator of JSON-able objects.

    The generator is pulled once before the status line goes out, so that an error before the first event is
    an ordinary error answer; a later one is an event ``{"error": ...}``. The stream ends with ``[DONE]``. The
    generator is closed whatever happens, also when the client has gone. ``id_field`` names the objects' field that is
    the events' id, which a client that comes back sends as ``Last-Event-ID``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        state: ServerState,
        headers: dict[str, str] | None = None,
        *,
        id_field: str | None = None,
    ) -> None:
        self._events = events
        self._id_field = id_field
        self._state = state
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises ``DeltaserveError`` before the first event only; ``ClientDisconnect``."""
        notes: dict[str, Any] = scope.setdefault("state", {})
        stream = self._send(send, notes)
        ended = await _watch(asyncio.ensure_future(stream), receive, self._state, closing=self._events.aclose)
        if isinstance(ended, ClientDisconnect):
            raise ended
        if ended is not None:
            if not notes.get("stream_started"):
                raise ended
            await self._fail(send, notes, ended)

    async def _send(self, send: Send, notes: dict[str, Any]) -> None:
        try:
            first = await anext(self._events, None)
            notes["stream_started"] = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if first is not None:
                await _event(send, first, self._id(first))
            async for event in self._events:
                await _event(send, event, self._id(event))
        except DeltaserveError as error:
            if not notes.get("stream_started"):
                raise
            await self._fail(send, notes, error)
            return
        except Exception as error:  # the status is out already: the error must be an event
            if not notes.get("stream_started"):
                raise
            log.error("stream_failed", exc_info=error)
            await self._fail(send, notes, DeltaserveError("Internal server error."))
            return
        await _done(send)

    def _id(self, event: dict[str, Any]) -> str | None:
        return None if self._id_field is None else str(event[self._id_field])

    async def _fail(self, send: Send, notes: dict[str, Any], error: DeltaserveError) -> None:
        notes["outcome"] = "unavailable" if error.status == 503 else "server_error"
        notes["error_code"], notes["rejected"] = error.code, isinstance(error, QueueTimeout)
        await _event(send, error.body())
        await _done(send)


async def _event(send: Send, event: dict[str, Any], event_id: str | None = None) -> None:
    line = b"" if event_id is None else f"id: {event_id}\n".encode()
    body = line + b"data: " + msgspec.json.encode(event) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _done(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _watch(
    task: asyncio.Future[Any],
    receive: Receive,
    state: ServerState,
    closing: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> ClientDisconnect | Unavailable | None:
    """Wait for ``task`` unless the client goes or the drain ends first; then cancel it and say which.

    ``closing`` is called once the task has ended, however it ended. Errors of the task itself are raised.
    """
    gone = asyncio.ensure_future(_disconnected(receive))
    halted = asyncio.ensure_future(state.halt.wait())
    try:
        await asyncio.wait((task, gone, halted), return_when=asyncio.FIRST_COMPLETED)
        finished = task.done()
        if finished:
            task.result()
            return None
        return ClientDisconnect() if gone.done() else Unavailable(_HALTED, retry_after=2)
    finally:
        for waiting in (task, gone, halted):
            waiting.cancel()
        await asyncio.gather(task, gone, halted, return_exceptions=True)
        if closing is not None:
            await closing()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
