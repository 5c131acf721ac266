"""The end: readiness first, running requests finish, what does not is told so."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx

from tests.api.fakes import NAME
from tests.api.running import Running, running

BODY = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}


def in_thread(server: Running, stream: bool, answers: list[httpx.Response]) -> threading.Thread:
    def run() -> None:
        with server.client() as client:
            answers.append(client.post("/v1/chat/completions", json={**BODY, "stream": stream}))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_running_requests_finish(tmp_path: Path) -> None:
    answers: list[httpx.Response] = []
    with running(tmp_path, drain_seconds=30) as server:
        server.engine.gated = True
        threads = [in_thread(server, stream, answers) for stream in (False, True)]
        for _ in threads:
            server.engine.started.get(timeout=10)
        with server.client() as client:
            assert client.get("/health/ready").status_code == 200
            server.drain()
            late = client.get("/health/ready")
            assert (late.status_code, late.json()["reason"]) == (503, "the server is shutting down")
            refused = client.post("/v1/chat/completions", json=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            assert client.post("/v1/deltas", data={"name": "x"}).status_code == 503
        server.call(server.engine.gate.set)
        for thread in threads:
            thread.join(20)
        server.thread.join(20)
        assert not server.thread.is_alive()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert all("world" in answer.text or "[DONE]" in answer.text for answer in answers)


def test_what_does_not_finish_is_told(tmp_path: Path) -> None:
    answers: list[httpx.Response] = []
    with running(tmp_path, drain_seconds=0.2) as server:
        server.engine.hang_after = 2
        threads = [in_thread(server, stream, answers) for stream in (False, True)]
        for _ in threads:
            server.engine.started.get(timeout=10)
        server.drain()
        for thread in threads:
            thread.join(20)
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert server.engine.running == 0
    whole = next(answer for answer in answers if answer.status_code == 503)
    assert whole.json()["error"]["code"] == "unavailable"
    stream = next(answer for answer in answers if answer.status_code == 200)
    assert '"unavailable"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
