"""Pins outlive the engine and the server; the engine, a real one, does what the user says of tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.command import eventually, serving
from tests.faults.conftest import Native
from tests.faults.requests import answer, upload

pytestmark = pytest.mark.xdist_group("faults")


def shown(http: httpx.Client, name: str) -> tuple[str, bool]:
    answered = http.get(f"/v1/deltas/{name}/residency")
    if answered.status_code == 503:  # the engine is not there yet
        return "unknown", False
    body = answered.raise_for_status().json()
    return body["tier"], body["pinned"]


def put(http: httpx.Client, name: str, tier: str, **fields: Any) -> httpx.Response:
    return http.put(f"/v1/deltas/{name}/residency", json={"tier": tier, **fields})


def pins_are_back(http: httpx.Client) -> bool:
    return (shown(http, "high"), shown(http, "low")) == (("device", True), ("host", True))


def test_pins_outlive_engine_and_server(flags: list[str], native_file: Native, tmp_path: Path) -> None:
    with serving(tmp_path / "data", *flags) as server, server.http() as http:
        for name, kind in (("high", "lora"), ("low", "bottleneck"), ("free", "bitfit")):
            assert upload(http, name, native_file(kind, 7)).status_code == 201
        before = answer(http, "high")
        for tier in ("disk", "device", "host", "disk"):
            placed = put(http, "free", tier)
            assert placed.status_code == 200, placed.text
            assert placed.json()["tier"] == tier
            assert shown(http, "free") == (tier, False)
        assert put(http, "high", "device", pinned=True).json()["bytes"] > 0
        assert put(http, "low", "host", pinned=True).json()["tier"] == "host"
        server.engine.kill()
        eventually(lambda: pins_are_back(http), within=60, what="the pins in the next engine")
        assert shown(http, "free") == ("disk", False)
        assert server.terminate() == 0
    with serving(tmp_path / "data", *flags) as server, server.http() as http:
        eventually(lambda: pins_are_back(http), within=60, what="the pins in the next server")
        assert answer(http, "high") == before
        assert server.terminate() == 0
