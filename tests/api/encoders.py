"""What the tests of encoders over HTTP share: uploads, heads, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from deltas.delta import Component, Delta
from deltas.formats import native

CLOSE = 1e-5


def push(http: httpx.Client, name: str, files: list[Path], **fields: str) -> httpx.Response:
    parts = [("file", (path.name, path.read_bytes())) for path in files]
    return http.post("/v1/deltas", data={"name": name, **fields}, files=parts)


def pushed(http: httpx.Client, name: str, files: list[Path]) -> dict[str, Any]:
    response = push(http, name, files)
    assert response.status_code == 201, (name, response.text)
    found: dict[str, Any] = response.json()
    return found


def save(folder: Path, name: str, delta: Delta) -> list[Path]:
    (folder / name).mkdir()
    path = folder / name / native.WEIGHTS
    native.save(delta, path)
    return [path]


def close(got: Any, wanted: Tensor) -> None:
    """Equal, relative to the largest number."""
    found = torch.tensor(got)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < CLOSE


def headed(body: Delta, outputs: int, width: int, kind: str = "classify", pooling: str = "mean") -> Delta:
    drawn = torch.randn(outputs, width, generator=torch.Generator().manual_seed(outputs))
    config = {
        "kind": kind,
        "pooling": pooling,
        "activations": ["identity"],
        "labels": [f"class {n}" for n in range(outputs)] if kind != "regress" else None,
    }
    return Delta((*body.components, Component("head", config, {"layers.0/weight": drawn / width**0.5})))


def refused(response: httpx.Response, code: str, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code, error
    return str(error["message"])
