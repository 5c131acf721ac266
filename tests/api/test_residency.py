"""Tiers by the user's hand: what the route takes and says, whose pins count, and what outlives the engine."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.api import placement
from server.errors import Conflict
from tests.api.running import Running, lora_files, push
from tests.api.test_deltas import tenant

__all__ = ["tenant"]


_seeds = itertools.count(100)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A delta that no other test has: the server, with its pins, is the module's."""
    return lora_files(tmp_path / "mood", seed=next(_seeds))


@pytest.fixture
def digest(tenant: httpx.Client, files: dict[str, Path]) -> str:
    """Of the tenant's delta ``mood``."""
    return str(push(tenant, files, name="mood").json()["digest"])


@pytest.fixture
def other(server: Running) -> Iterator[httpx.Client]:
    """A client of another tenant, ``also-...``."""
    name = f"also-{os.urandom(6).hex()}"
    with server.client() as admin:
        key = admin.post("/v1/tenants", json={"name": name}).json()["key"]
    with server.client(key) as client:
        yield client


def put(client: httpx.Client, name: str, tier: str, **fields: object) -> httpx.Response:
    return client.put(f"/v1/deltas/{name}/residency", json={"tier": tier, **fields})


def test_a_delta_goes_where_it_is_sent(tenant: httpx.Client, server: Running, digest: str) -> None:
    shown = tenant.get("/v1/deltas/mood/residency")
    assert shown.status_code == 200
    assert shown.json() == {
        "object": "delta.residency",
        "name": "mood",
        "version": 1,
        "digest": digest,
        "tier": "disk",
        "pinned": False,
        "bytes": 256,
    }
    for tier, pinned in (
        ("device", True),
        ("host", True),
        ("host", False),
        ("device", False),
        ("disk", False),
    ):
        answer = put(tenant, "mood", tier, pinned=pinned)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["tier"], answer.json()["pinned"]) == (tier, pinned)
        assert answer.json()["bytes"] == (256 if tier == "disk" else 1000)
        assert tenant.get("/v1/deltas/mood@live/residency").json() == answer.json()
        assert server.engine.pins == ({digest: tier} if pinned else {})


def test_bad_requests_name_the_field(tenant: httpx.Client, digest: str) -> None:
    for body, param in (
        ({"tier": "gpu"}, "tier"),
        ({}, "tier"),
        ({"tier": "host", "pinned": "often"}, "pinned"),
        ({"tier": "host", "pin": True}, "pin"),
    ):
        answer = tenant.put("/v1/deltas/mood/residency", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
    on_disk = put(tenant, "mood", "disk", pinned=True)
    assert on_disk.status_code == 400
    assert "'device' or 'host'" in on_disk.json()["error"]["message"]
    for name in ("nothing", "mood@2", "mood@other", "mood+mood"):
        assert tenant.get(f"/v1/deltas/{name}/residency").status_code == 404
        assert put(tenant, name, "host").status_code == 404


def test_what_the_engine_refuses_changes_nothing(tenant: httpx.Client, server: Running, digest: str) -> None:
    put(tenant, "mood", "host", pinned=True)
    server.engine.load_failure = Conflict("no room")
    answer = put(tenant, "mood", "device", pinned=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    assert server.engine.pins == {digest: "host"}
    shown = tenant.get("/v1/deltas/mood/residency").json()
    assert (shown["tier"], shown["pinned"]) == ("host", True)


def test_a_public_delta_may_be_looked_at_only(server: Running, other: httpx.Client, tmp_path: Path) -> None:
    with server.client() as admin:
        push(admin, lora_files(tmp_path / "open", seed=3), name="open", visibility="public")
        push(admin, lora_files(tmp_path / "shut", seed=4), name="shut")
    shown = other.get("/v1/deltas/default/open/residency")
    assert (shown.status_code, shown.json()["tier"]) == (200, "disk")
    refused = put(other, "default/open", "device", pinned=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    for answer in (other.get("/v1/deltas/default/shut/residency"), put(other, "default/shut", "host")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_one_content_keeps_the_highest_pin_of_its_owners(
    tenant: httpx.Client, other: httpx.Client, server: Running, digest: str, files: dict[str, Path]
) -> None:
    push(other, files, name="same")
    put(tenant, "mood", "device", pinned=True)
    answer = put(other, "same", "host", pinned=True).json()
    assert (answer["digest"], answer["tier"], answer["pinned"]) == (digest, "device", True)
    assert put(other, "same", "disk").json()["tier"] == "device"
    put(other, "same", "host", pinned=True)
    assert server.engine.pins == {digest: "device"}
    put(tenant, "mood", "device", pinned=False)
    assert server.engine.pins == {digest: "host"}
    put(other, "same", "host", pinned=False)
    assert server.engine.pins == {}


def test_a_pin_goes_with_its_version(
    tenant: httpx.Client, other: httpx.Client, server: Running, digest: str, files: dict[str, Path]
) -> None:
    push(other, files, name="same")
    put(tenant, "mood", "device", pinned=True)
    put(other, "same", "host", pinned=True)
    assert tenant.delete("/v1/deltas/mood/versions/1").status_code == 200
    assert server.engine.pins == {digest: "host"}
    assert other.delete("/v1/deltas/same").status_code == 200
    assert server.engine.pins == {}
    push(tenant, files, name="mood")
    assert tenant.get("/v1/deltas/mood/residency").json()["pinned"] is False


def test_a_tenants_pins_go_with_it_and_no_others(
    tenant: httpx.Client, server: Running, digest: str, files: dict[str, Path]
) -> None:
    put(tenant, "mood", "host", pinned=True)
    with server.client() as admin:
        key = admin.post("/v1/tenants", json={"name": "short-lived"}).json()["key"]
        with server.client(key) as client:
            push(client, files, name="same")
            put(client, "same", "device", pinned=True)
        assert server.engine.pins == {digest: "device"}
        assert admin.delete("/v1/tenants/short-lived").status_code == 200
    assert server.engine.pins == {digest: "host"}
    assert tenant.get("/v1/deltas/mood/residency").json()["pinned"] is True


def test_a_new_engine_gets_the_pins(tenant: httpx.Client, server: Running, digest: str) -> None:
    put(tenant, "mood", "host", pinned=True)
    server.engine.reset()
    server.engine.load_failure = Conflict("no room")
    restore(server)
    assert server.engine.pins == {}  # logged, no more
    server.engine.load_failure = None
    restore(server)
    assert server.engine.pins[digest] == "host"
    assert tenant.get("/v1/deltas/mood/residency").json()["pinned"] is True


def restore(server: Running) -> None:
    asyncio.run_coroutine_threadsafe(placement.restore(server.services), server.loop).result(10)
