"""What surrounds every request, as plain ASGI: its id, the last-resort 500, the access log, metrics, the
drain's count.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logging
from server.api.errors import error_response
from server.api.services import Services
from server.errors import DeltaserveError

log = logging.get("server.api")

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_UNCOUNTED = ("/health/", "/metrics")
_COMPUTING = ("chat", "completion", "embedding", "classify", "score", "task")
CLIENT_CLOSED = 499


class RequestScope:
    """Give each request an id, answer whatever escapes with a 500 without internals, log and count it."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scope types pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        counted = not scope["path"].startswith(_UNCOUNTED)
        start = time.perf_counter()
        if counted:
            self._services.state.enter()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            state["outcome"] = "cancelled"
        except Exception as error:  # the last resort: the client gets a 500, the log the cause
            log.error("unhandled_exception", path=scope["path"], exc_info=error)
            state["outcome"] = "server_error"
            if status == 0:
                failure = error_response(DeltaserveError("Internal server error."))
                await failure(scope, receive, send_with_id)
        finally:
            if counted:
                self._services.state.leave()
                self._account(scope, state, status, time.perf_counter() - start)
            structlog.contextvars.unbind_contextvars("request_id")

    def _account(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        outcome = state.get("outcome") or _outcome(status)
        kind = state.get("kind", "other")
        computes = kind in _COMPUTING and outcome == "ok"
        self._services.metrics.request_done(kind, outcome, seconds if computes else None)
        if status in (401, 403, 413, 429, 503) or state.get("rejected"):
            self._services.metrics.rejected(state.get("error_code", "unavailable"))
        log.info(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status or CLIENT_CLOSED,
            outcome=outcome,
            seconds=round(seconds, 4),
            tenant=state.get("tenant"),
        )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req-{secrets.token_hex(12)}"


def _outcome(status: int) -> str:
    if status == 0 or status == CLIENT_CLOSED:
        return "cancelled"
    if status < 400:
        return "ok"
    if status == 503:
        return "unavailable"
    if status == 429:
        return "limited"
    return "client_error" if status < 500 else "server_error"
