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

_LAST_SECONDS = 5  # for answers on their way out, once nothing computes any more


class PortInUseError(OSError):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """A listening address. Raises ``PortInUseError`` saying which."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PortInUseError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PortInUseError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return bound


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
    """Serve on ``bound`` until a signal ends it; returns why it failed, or None."""
    async with open_services(settings) as services:
        services.on_ready = on_ready
        server = http_server(services)
        services.state.on_failure = lambda: setattr(server, "should_exit", True)
        with drain_on_signals(services, server):
            if services.state.fatal is None:
                await server.serve(sockets=[bound])
        return services.state.fatal


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

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in signals:
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
