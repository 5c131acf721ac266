"""SIGTERM: running streams finish, new work is refused, the exit code is 0 and nothing stays behind."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from tests.api.command import eventually, serving
from tests.faults.conftest import Native
from tests.faults.requests import BACKBONE, LONG, body, streaming, upload

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("faults")]

TOKENS = 600


async def test_running_streams_finish(flags: list[str], native_file: Native, tmp_path: Path) -> None:
    flags = [*flags, "--drain-seconds", "120"]
    with serving(tmp_path / "data", *flags) as server, server.http() as http:
        assert upload(http, "mine", native_file("lora", 0)).status_code == 201
        children = [server.engine, server.valkey]
        async with streaming(server) as streams:
            running = await streams.start(*(body(model, TOKENS) for model in (BACKBONE, "mine") * 2))
            server.process.send_signal(signal.SIGTERM)
            ready = eventually(
                lambda: (r := http.get("/health/ready")).status_code == 503 and r, within=5, what="not ready"
            )
            assert "shutting down" in ready.json()["reason"]
            assert http.get("/health/live").status_code == 200
            for response in (
                http.post("/v1/completions", json=body("mine", 4)),
                upload(http, "late", native_file("lora", 1)),
            ):
                assert response.status_code == 503
                assert "retry-after" in response.headers
            assert not any(stream.done for stream in running), "they were to run while it drains"
            await streams.ended(within=60)
            for stream in running:
                assert stream.error is None
                assert stream.done
                assert stream.finish_reason == "length"
                assert len(stream.token_ids) == TOKENS
        assert await asyncio.to_thread(server.process.wait, 15) == 0
        assert not any(child.alive for child in children)
        assert "Traceback" not in server.log()


async def test_streams_that_are_too_long_end_in_an_error(flags: list[str], tmp_path: Path) -> None:
    with serving(tmp_path / "data", *flags, "--drain-seconds", "0.1") as server:
        children = [server.engine, server.valkey]
        async with streaming(server) as streams:
            running = await streams.start(body(BACKBONE, LONG), body(BACKBONE, LONG))
            assert await asyncio.to_thread(server.terminate, 15) == 0
            await streams.ended(within=5)
            for stream in running:
                assert stream.done
                assert stream.error is not None
                assert stream.error["code"] == "unavailable"
        assert not any(child.alive for child in children)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)
