"""The embedded Valkey is killed: running rows do not notice, requests are served again within seconds."""

from __future__ import annotations

import httpx
import pytest

from tests.api.command import Server, eventually
from tests.faults.conftest import Native
from tests.faults.requests import answer, body, streaming, upload

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("faults")]

TOKENS = 600


async def test_it_comes_back_with_everything(server: Server, native_file: Native) -> None:
    with server.http() as http:
        assert upload(http, "kept", native_file("bitfit", 80)).status_code == 201
        before = answer(http, "kept")
        listed = http.get("/v1/deltas?limit=100").json()["data"]
        async with streaming(server) as streams:
            (running,) = await streams.start(body("kept", TOKENS))
            for seed in range(81, 84):
                killed = server.valkey
                killed.kill()

                def served(seed: int = seed) -> httpx.Response | None:
                    """Works, or says that the registry is away."""
                    response = upload(http, f"after-{seed}", native_file("lora", seed))
                    if response.status_code in (200, 201):
                        return response
                    assert response.status_code == 503
                    assert response.json()["error"]["code"] == "registry_unavailable"
                    assert "retry-after" in response.headers
                    return None

                eventually(served, within=10, what="an upload after the kill")
                assert server.valkey != killed
                assert not killed.alive
                assert answer(http, "kept") == before
            await streams.ended(within=60)
        assert running.finish_reason == "length"
        assert len(running.token_ids) == TOKENS
        after = http.get("/v1/deltas?limit=100").json()["data"]
        assert after[: len(listed)] == listed
        assert [item["name"] for item in after[len(listed) :]] == ["after-81", "after-82", "after-83"]
        assert server.log().count("ended with code -9") == 3
