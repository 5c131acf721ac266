"""Rows whose client goes away, and rows whose delta is deleted under them."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.api.command import Server, eventually
from tests.faults.conftest import Native
from tests.faults.requests import (
    BACKBONE,
    LONG,
    answer,
    body,
    metric,
    streaming,
    upload,
    wait_for_rows,
)

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("faults")]


async def test_a_client_that_hangs_up_frees_its_row(server: Server, native_file: Native) -> None:
    """Within a second, as the metrics show it; the other rows go on."""
    with server.http() as http:
        upload(http, "hang-up", native_file("bottleneck", 60))
    async with streaming(server) as streams:
        running = await streams.start(*(body(model, LONG) for model in (BACKBONE, "hang-up") * 2))
        await asyncio.to_thread(wait_for_rows, server, 4, 10)
        for left, stream in ((3, running[0]), (2, running[1])):
            before = time.monotonic()
            await streams.hang_up(stream)
            await asyncio.to_thread(wait_for_rows, server, left, 5)
            assert time.monotonic() - before < 1
        # the same for an answer in one piece
        whole = asyncio.create_task(streams.http.post("/v1/completions", json=body("hang-up", LONG)))
        await asyncio.to_thread(wait_for_rows, server, 3, 10)
        before = time.monotonic()
        whole.cancel()
        await asyncio.gather(whole, return_exceptions=True)
        await asyncio.to_thread(wait_for_rows, server, 2, 5)
        assert time.monotonic() - before < 1
        assert not running[2].done
        assert not running[3].done
    await asyncio.to_thread(wait_for_rows, server, 0, 5)
    assert metric(server, "kv_cache_usage_ratio") == 0


async def test_a_deleted_delta_serves_its_running_rows(server: Server, native_file: Native) -> None:
    tokens = 600
    with server.http() as http:
        assert upload(http, "doomed", native_file("lora", 61)).status_code == 201
        alone = answer(http, "doomed")
        await asyncio.to_thread(wait_for_rows, server, 0, 5)
        async with streaming(server) as streams:
            running = await streams.start(*(body("doomed", tokens) for _ in range(3)))
            assert http.delete("/v1/deltas/doomed").status_code == 200
            for response in (
                http.post("/v1/completions", json=body("doomed", 4)),
                http.post("/v1/completions", json=body("doomed@1", 4)),
            ):
                assert response.status_code == 404
                assert response.json()["error"]["code"] == "model_not_found"
            assert http.get("/v1/deltas/doomed").status_code == 404
            assert not any(stream.done for stream in running), "they were to run while it was deleted"
            assert not [*(server.data / "blobs").rglob(f"{alone.digest}*")]
            await streams.ended(within=60)
        for stream in running:
            assert stream.error is None
            assert stream.finish_reason == "length"
            assert stream.headers["x-delta-digest"] == alone.digest
            assert len(stream.token_ids) == tokens
            assert tuple(stream.token_ids[:12]) == alone.token_ids
        # the same content again is a new delta like any other
        assert upload(http, "doomed", native_file("lora", 61)).status_code == 201
        assert answer(http, "doomed") == alone


async def test_deletes_race_with_requests(server: Server, native_file: Native) -> None:
    """Each request is answered whole, or 404, or ends in an error of its own; the engine lives through it."""
    engine = server.engine
    with server.http() as http:
        for seed in range(62, 72):
            file = native_file("prompt" if seed % 2 else "lora", seed)
            assert upload(http, "racing", file).status_code == 201
            async with streaming(server) as streams:
                starting = asyncio.create_task(streams.start(*[body("racing", 5)] * 4))
                await asyncio.to_thread(http.delete, "/v1/deltas/racing")
                again = await asyncio.to_thread(upload, http, "racing-again", file)
                assert again.status_code == 201
                await starting
                await streams.ended(within=20)
                for stream in streams.all:
                    if stream.status == 200 and stream.error is None:
                        assert len(stream.token_ids) == 5
                    else:
                        assert stream.error is not None
                        assert stream.error["code"] in ("model_not_found", "row_failed")
            assert answer(http, "racing-again", 5).digest == again.json()["digest"]
            assert http.delete("/v1/deltas/racing-again").status_code == 200
    assert server.engine == engine
    eventually(lambda: metric(server, "requests_running") == 0, within=5, what="an idle engine")
