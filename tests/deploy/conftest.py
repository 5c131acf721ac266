"""What the deploy tests scrape, and the Prometheus that scrapes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from server.metrics import CONTENT_TYPE, Metrics
from server.types import EngineStats
from tests.deploy.promserver import Prometheus, Target, running


class _BusyServer:
    """A server's metrics under steady traffic: each scrape finds that more has happened since the last."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self._lock = threading.Lock()
        self._ticks = 0

    def scrape(self) -> bytes:
        with self._lock:
            self._ticks += 1
            self._happen()
            return self.metrics.render()

    def _happen(self) -> None:
        metrics, ticks = self.metrics, self._ticks
        metrics.engine_up(True)
        metrics.stored(12, 12 << 20)
        for outcome in ("ok", "client_error", "server_error", "unavailable", "limited", "cancelled"):
            metrics.request_done("chat", outcome, 0.4)
        metrics.rejected("rate_limit_exceeded")
        metrics.prompt_accepted("default", 100)
        metrics.tokens_generated("default", 40)
        metrics.first_token(0.08)
        metrics.next_tokens(0.06, 2)
        metrics.apply_stats(
            EngineStats(
                rows_running=8,
                rows_waiting=2,
                kv_tokens_used=500,
                kv_tokens_total=1000,
                deltas_device=4,
                deltas_host=8,
                delta_bytes_device=4 << 20,
                delta_bytes_host=8 << 20,
                preemptions=ticks,
                steps=10 * ticks,
                loads_from_host=ticks,
                loads_from_disk=2 * ticks,
                load_failures=ticks,
                quarantined=[f"{ticks:064x}"],
                load_seconds=[0.02],
                batch_rows=[8],
                batch_deltas=[4],
                queue_seconds=[0.01],
            )
        )


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    """The /metrics that is scraped. Anything that listens and is busy will do."""
    busy = _BusyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = busy.scrape()
            self.send_response(200)
            self.send_header("content-type", CONTENT_TYPE)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Target(f"127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def prometheus(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A real Prometheus that scrapes the target every second."""
    with running(tmp_path_factory.mktemp("prometheus"), target) as server:
        yield server
