"""What the tests of tasks share."""

from __future__ import annotations

from typing import Any

import httpx


def define(http: httpx.Client, name: str, kind: str, model: str, **more: Any) -> dict[str, Any]:
    """A task; its object."""
    response = http.post("/v1/tasks", json={"name": name, "kind": kind, "model": model} | more)
    assert response.status_code in (200, 201), response.text
    found: dict[str, Any] = response.json()
    return found


def infer(http: httpx.Client, name: str, *inputs: Any, **parameters: Any) -> list[dict[str, Any]]:
    """A call's outputs, one for each input."""
    response = http.post(f"/v1/tasks/{name}/infer", json={"inputs": [*inputs], "parameters": parameters})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["outputs"]
    assert len(found) == len(inputs)
    return found
