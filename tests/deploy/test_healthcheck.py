"""The container's health check, run as the image runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "healthcheck.py"


def _check(port: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DELTASERVE_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)


@contextmanager
def _answering(status: int, body: bytes) -> Iterator[int]:
    """A server that answers /health/ready, and only that, with ``status``; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_ready() -> None:
    with _answering(200, b"{}") as port:
        assert _check(port).returncode == 0


def test_not_ready_says_why() -> None:
    with _answering(503, b"the backbone is loading") as port:
        done = _check(port)
    assert done.returncode == 1
    assert "the backbone is loading" in done.stderr


def test_nobody_listens() -> None:
    with _answering(200, b"") as port:
        pass
    done = _check(port)
    assert done.returncode == 1
    assert str(port) in done.stderr
