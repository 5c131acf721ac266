"""A small server of tuning jobs on a real socket, which loses connections on purpose: what the command line talks to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

JOB = "ftjob-1"
PATH = f"/v1/fine_tuning/jobs/{JOB}"


def event(number: int, message: str, **data: Any) -> dict[str, Any]:
    """A ``fine_tuning.job.event``; one of metrics where there are data."""
    return {
        "id": f"ftevent-1-{number}",
        "object": "fine_tuning.job.event",
        "created_at": 1_700_000_000 + number,
        "level": "info",
        "message": message,
        "type": "metrics" if data else "message",
        "data": data,
    }


def steps(first: int, last: int, total: int) -> list[dict[str, Any]]:
    """Events of steps."""
    return [
        event(n, f"Step {n}/{total}: training loss={1 / n:.4f}", step=n, total_steps=total, train_loss=1 / n)
        for n in range(first, last + 1)
    ]


@dataclass
class Jobs:
    """The one job. ``streams`` are what each connection to its events is sent, the last again and again; a number in one
    is an HTTP status to answer, ``None`` at its end breaks the connection, ``...`` keeps it open."""

    url: str = ""
    streams: list[list[Any]] = field(default_factory=list)
    status: str = "succeeded"
    error: dict[str, Any] | None = None
    refusal: dict[str, Any] | None = None  # of POST jobs
    plan: dict[str, Any] | None = None
    task: str = "classify"
    asked: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    uploads: list[bytes] = field(default_factory=list)
    resumed: list[str | None] = field(default_factory=list)  # Last-Event-ID of each stream
    closing: threading.Event = field(default_factory=threading.Event)

    def job(self, status: str | None = None) -> dict[str, Any]:
        """Its object."""
        return {
            "id": JOB,
            "object": "fine_tuning.job",
            "status": status or self.status,
            "created_at": 1_700_000_000,
            "fine_tuned_model": "mine" if self.status == "succeeded" else None,
            "result_files": ["file-9"] if self.status == "succeeded" else [],
            "error": self.error,
            "delta": {"task": self.task},
            "progress": {"step": 4, "steps": 4, "pausing": status == "running"},
        }


@contextmanager
def serving(jobs: Jobs) -> Iterator[Jobs]:
    """On a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def _answer(self, body: Any, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            jobs.asked.append(("GET", self.path))
            if self.path == "/v1/models":
                self._answer({"data": [{"id": "base", "parent": None, "kind": "encoder"}]})
            elif self.path == PATH:
                self._answer(jobs.job())
            elif self.path == f"{PATH}/events":
                self._stream()
            elif self.path.startswith("/v1/fine_tuning/jobs?"):
                self._answer({"data": [jobs.job()], "has_more": False})
            else:
                self._answer({"error": {"message": "no such job", "code": "not_found"}}, 404)

        def do_POST(self) -> None:
            jobs.asked.append(("POST", self.path))
            content = self.rfile.read(int(self.headers["content-length"] or 0))
            if self.path == "/v1/files":
                jobs.uploads.append(content)
                self._answer({"id": f"file-{len(jobs.uploads)}"})
            elif self.path == "/v1/fine_tuning/jobs":
                jobs.bodies.append(json.loads(content))
                if jobs.refusal is not None:
                    self._answer({"error": jobs.refusal}, 400)
                else:
                    self._answer(jobs.plan or jobs.job("queued"))
            else:
                self._answer(jobs.job("running" if self.path.endswith("pause") else "cancelled"))

        def _stream(self) -> None:
            jobs.resumed.append(self.headers.get("last-event-id"))
            parts = jobs.streams.pop(0) if len(jobs.streams) > 1 else jobs.streams[0]
            if parts and isinstance(parts[0], int):
                self._answer({"error": {"message": "not now", "code": "unavailable"}}, parts[0])
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            for part in parts:
                if part is None:
                    return  # the body has no end: a broken connection
                if part is ...:
                    jobs.closing.wait()
                    return
                self._chunk(f"id: {part['id']}\ndata: {json.dumps(part)}\n\n")
            self._chunk("data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, text: str) -> None:
            data = text.encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        jobs.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield jobs
        finally:
            jobs.closing.set()
            server.shutdown()
            thread.join()
