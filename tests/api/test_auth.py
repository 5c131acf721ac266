"""Every route denies by default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.api.running import ADMIN, Running, running

OPEN = {"/health/live", "/health/ready"}


def endpoints(app: Any) -> list[tuple[str, str]]:
    """Every (method, path) that the app answers."""
    found = []
    for context in app.router.routes:
        for route in getattr(context, "routes", None) or [context]:
            found += _endpoints(route)
    return found


def _endpoints(route: Any) -> list[tuple[str, str]]:
    inner = getattr(route, "original_router", None)
    if inner is not None:
        return [pair for item in inner.routes for pair in _endpoints(item)]
    return [(method, route.path) for method in route.methods if method != "HEAD"]


def concrete(path: str) -> str:
    return re.sub(r"\{[^}]*version[^}]*\}", "1", re.sub(r"\{(?![^}]*version)[^}]*\}", "some", path))


def test_every_route_but_health_needs_a_key(server: Running) -> None:
    app = server.server.config.app
    found = endpoints(app)
    assert len(found) > 25
    with server.client(None) as client, server.client("ds-wrong") as wrong:
        for method, path in found:
            if path in OPEN:
                assert client.request(method, path).status_code == 200
                continue
            for http in (client, wrong):
                answer = http.request(method, concrete(path))
                assert answer.status_code == 401, (method, path)
                error = answer.json()["error"]
                assert error["code"] == "invalid_api_key"
                assert set(error) == {"message", "type", "param", "code"}
                assert answer.headers["www-authenticate"] == "Bearer"


def test_admin_routes_refuse_a_tenants_key(server: Running) -> None:
    with server.client() as admin:
        key = admin.post("/v1/tenants", json={"name": "mallory"}).json()["key"]
    with server.client(key) as client:
        for method, path in endpoints(server.server.config.app):
            if path.startswith("/v1/tenants") or path == "/metrics":
                assert client.request(method, concrete(path)).status_code == 403, (method, path)


@pytest.mark.parametrize("header", ["", "Bearer", f"Basic {ADMIN}", ADMIN, f"Bearer {ADMIN} x"])
def test_malformed_authorization(server: Running, header: str) -> None:
    with server.client(None) as client:
        assert client.get("/v1/models", headers={"authorization": header}).status_code == 401


def test_unauthenticated_bodies_are_not_read(server: Running) -> None:
    with server.client(None) as client:
        answer = client.post("/v1/chat/completions", content=b"{nonsense")
        assert answer.status_code == 401


def test_metrics_open(tmp_path: Path) -> None:
    with running(tmp_path, metrics_open=True) as server, server.client(None) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401
