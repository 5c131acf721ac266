"""The HTTP server: uvicorn over the app, and the order in which everything ends.

SIGTERM or SIGINT: readiness turns 503, no new work is taken, running requests have ``drain_seconds`` to
finish, what still runs then ends with an error, and the process exits 0. A second signal ends the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn

from server import logging
from server.api.app import create_app
from server.api.lifespan import open_services
from server.api.services import Backbone, Services
from server.config import Settings

log = logging.get("server.api")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_SECONDS = 5  # for answers on their way out, once nothing computes any more


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are ours: see ``drain_on_signals``."""
        yield


def http_server(services: Services) -> HttpServer:
    """The server over the app, not yet running."""
    config = uvicorn.Config(
        create_app(services),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
        ws="none",
    )
    return HttpServer(config)


async def serve(settings: Settings, bound: socket.socket, on_ready: Callable[[Backbone], None]) -> str | None:
    """Serve on ``bound`` until a signal ends it; returns why it failed, or None.

    Raises ``CancelledError`` for a signal before the port was open.
    """
    _cancel_on_signals()  # nothing runs yet that would need to be drained
    async with open_services(settings) as services:
        services.on_ready = on_ready
        server = http_server(services)
        services.state.on_failure = lambda: setattr(server, "should_exit", True)
        with drain_on_signals(services, server):
            if services.state.fatal is None:
                await server.serve(sockets=[bound])
        return services.state.fatal


def _cancel_on_signals() -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        for number in _SIGNALS:
            loop.add_signal_handler(number, task.cancel)


@contextlib.contextmanager
def drain_on_signals(services: Services, server: uvicorn.Server) -> Generator[None, None, None]:
    """Handle SIGTERM and SIGINT while in the block."""
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        if draining:
            services.state.halt.set()
        else:
            draining.append(loop.create_task(drain(services, server)))

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def drain(services: Services, server: uvicorn.Server) -> None:
    """Let running requests finish, end the rest, and stop the server."""
    state = services.state
    state.draining = True
    log.info("draining", in_flight=state.in_flight, seconds=services.settings.drain_seconds)
    waits = [asyncio.ensure_future(event.wait()) for event in (state.idle, state.halt)]
    await asyncio.wait(waits, timeout=services.settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if state.in_flight:
        log.warning("drain_time_is_up", in_flight=state.in_flight)
    state.halt.set()
    server.should_exit = True
