"""A server with one place in the batch: who waits too long for it is told so, and the rest is as it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.api.command import serving
from tests.faults.requests import BACKBONE, LONG, body, metric, streaming, wait_for_rows

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("faults")]


async def test_a_request_that_waits_too_long(flags: list[str], tmp_path: Path) -> None:
    with serving(tmp_path / "data", *flags, "--max-rows", "1", "--queue-timeout-seconds", "0.2") as server:
        async with streaming(server) as streams:
            (running,) = await streams.start(body(BACKBONE, LONG))
            await asyncio.to_thread(wait_for_rows, server, 1, 10)
            late = await streams.http.post("/v1/completions", json=body(BACKBONE, 4))
            assert not running.done
            assert late.status_code == 503
            assert int(late.headers["retry-after"]) >= 1
            assert late.json()["error"]["code"] == "queue_timeout"
            assert "--queue-timeout-seconds" in late.json()["error"]["message"]
        await asyncio.to_thread(wait_for_rows, server, 0, 5)
        assert metric(server, 'admission_rejections_total{reason="queue_timeout"}') == 1
        assert metric(server, "requests_waiting") == 0
