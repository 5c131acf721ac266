"""A closed connection frees its rows within a second; nothing else does."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from tests.api.fakes import NAME
from tests.api.running import ADMIN, Running


def send(server: Running, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ADMIN}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(head.encode() + data)
    return connection


CHAT = ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "x"}]})
TEXT = ("/v1/completions", {"model": NAME, "prompt": "x"})


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hang_after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [CHAT, TEXT])
def test_rows_are_freed(
    server: Running, path: str, body: dict[str, Any], stream: bool, hang_after: int, rows: int
) -> None:
    server.engine.hang_after = hang_after
    with send(server, path, {**body, "stream": stream, "n": rows}) as connection:
        for _ in range(rows):
            server.engine.started.get(timeout=10)
        if stream and hang_after:
            seen = b""
            while b"data: " not in seen:
                seen += connection.recv(65536)
        assert server.engine.ended.empty()
    for _ in range(rows):
        server.engine.ended.get(timeout=1)
    assert server.engine.running == 0


def test_a_slow_reader_keeps_its_row_until_it_goes(server: Running) -> None:
    server.engine.reply = "x" * 400
    server.engine.hang_after = 300
    path, body = CHAT
    with send(server, path, {**body, "stream": True}):
        server.engine.started.get(timeout=10)
        assert server.engine.ended.empty()
    server.engine.ended.get(timeout=1)


def test_neighbours_are_untouched(server: Running) -> None:
    path, body = CHAT
    server.engine.hang_after = 2
    with send(server, path, {**body, "stream": True}), server.client() as client:
        server.engine.started.get(timeout=10)
        server.engine.hang_after = None
        answer = client.post(path, json=body)
        assert answer.json()["choices"][0]["message"]["content"] == "Hello, world!"
        assert server.engine.ended.get(timeout=1) == 1
        assert server.engine.ended.empty()
    server.engine.ended.get(timeout=1)


def test_disconnects_are_counted_as_cancelled(server: Running) -> None:
    path, body = CHAT
    server.engine.hang_after = 0
    with send(server, path, body):
        server.engine.started.get(timeout=10)
    server.engine.ended.get(timeout=1)
    with httpx.Client(base_url=server.url) as client:
        for _ in range(200):
            text = client.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text
            if 'deltaserve_requests_total{kind="chat",outcome="cancelled"}' in text:
                break
        else:
            pytest.fail("not counted")
