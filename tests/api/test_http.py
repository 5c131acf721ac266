"""Request ids, error bodies, limits on bodies, health, metrics."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx
import pytest

from server.api.body import MAX_JSON_BYTES
from tests.api.fakes import NAME
from tests.api.running import ADMIN, Running, running

CHAT = "/v1/chat/completions"


def error(answer: httpx.Response) -> dict[str, str | None]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, str | None] = body["error"]
    return found


def test_request_ids(http: httpx.Client) -> None:
    made = http.get("/health/live").headers["x-request-id"]
    assert made.startswith("req-")
    assert http.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/nowhere", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")
    assert http.get("/nowhere", headers={"x-request-id": "x" * 129}).headers["x-request-id"] != "x" * 129
    chat = http.post(CHAT, json={"model": NAME, "messages": [{"role": "user", "content": "x"}]})
    assert chat.json()["id"] == f"chatcmpl-{chat.headers['x-request-id']}"


def test_routes_that_are_not_there(http: httpx.Client) -> None:
    for path in ("/nowhere", "/docs", "/openapi.json", "/v1/models/"):
        answer = http.get(path)
        assert answer.status_code == 404
        assert error(answer)["type"] == "invalid_request_error"
    answer = http.get(CHAT)
    assert answer.status_code == 405
    assert error(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_nonsense_is_400(http: httpx.Client, content: bytes) -> None:
    answer = http.post(CHAT, content=content)
    assert answer.status_code == 400
    assert error(answer)["code"] == "invalid_json"


def test_query_parameters_are_checked(http: httpx.Client) -> None:
    for query in ("limit=0", "limit=101", "limit=x"):
        answer = http.get(f"/v1/deltas?{query}")
        assert answer.status_code == 400
        assert error(answer)["param"] == "limit"
    answer = http.get("/v1/deltas/x/versions/one")
    assert (answer.status_code, error(answer)["param"]) == (400, "version")


def test_large_bodies_are_refused_while_they_come(http: httpx.Client, server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ADMIN}\r\n"
        connection.sendall(f"{head}content-length: {MAX_JSON_BYTES + 1}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(65536)  # nothing of the body was sent

    def chunks() -> object:
        for _ in range(MAX_JSON_BYTES // 65536 + 1):
            yield b" " * 65536

    answer = http.post(CHAT, content=chunks())  # type: ignore[arg-type]
    assert answer.status_code == 413
    assert error(answer)["code"] == "too_large"


def test_unhandled_errors_show_nothing(http: httpx.Client, server: Running) -> None:
    server.engine.fail_after, server.engine.failure = 0, ZeroDivisionError("secret detail")  # type: ignore[assignment]
    for stream in (False, True):
        body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "stream": stream}
        answer = http.post(CHAT, json=body)
        assert answer.status_code == 500
        assert error(answer)["code"] == "internal_error"
        assert "secret" not in answer.text
        assert "x-request-id" in answer.headers
    server.engine.fail_after = 2
    answer = http.post(CHAT, json=body)
    assert '"internal_error"' in answer.text
    assert "secret" not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_not_ready(tmp_path: Path) -> None:
    with running(tmp_path) as server, server.client() as client:
        assert client.get("/health/ready").json() == {"status": "ready"}
        server.engine.not_ready = "the engine is starting"
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the engine is starting")
        body = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}
        answer = client.post(CHAT, json=body)
        assert (answer.status_code, error(answer)["code"]) == (503, "engine_restarting")
        assert "starting" in str(error(answer)["message"])
        assert answer.headers["retry-after"]
        server.services.resident = None
        for answer in (client.post(CHAT, json=body), client.get("/v1/models")):
            assert (answer.status_code, error(answer)["code"]) == (503, "unavailable")
        assert client.get("/health/live").status_code == 200
        assert client.get("/v1/deltas").status_code == 200


def test_metrics(http: httpx.Client, server: Running) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}
    assert http.post(CHAT, json=body).status_code == 200
    assert http.post(CHAT, json={**body, "n": 0}).status_code == 400
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    for line in (
        'deltaserve_requests_total{kind="chat",outcome="ok"}',
        'deltaserve_requests_total{kind="chat",outcome="client_error"}',
        'deltaserve_generated_tokens_total{tenant="default"}',
        "deltaserve_engine_up 1.0",
        "deltaserve_time_to_first_token_seconds_count",
        "deltaserve_request_seconds_count",
    ):
        assert line in answer.text
    assert json.dumps(NAME) not in answer.text


def test_keep_alive_after_a_stream(http: httpx.Client) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "stream": True}
    for _ in range(3):
        assert http.post(CHAT, json=body).text.endswith("data: [DONE]\n\n")
