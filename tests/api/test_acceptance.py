"""Uploads that were read without fault and do not stand their first forward pass."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from server.types import ProbeResult
from tests.api.running import Running, lora_files, push

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def tenant(server: Running) -> Iterator[httpx.Client]:
    """A client with a fresh tenant's key."""
    with server.client() as admin:
        key = admin.post("/v1/tenants", json={"name": f"t-{os.urandom(6).hex()}"}).json()["key"]
    with server.client(key, params={}) as client:
        yield client


def scaled(folder: Path, **sides: float) -> dict[str, Path]:
    """A LoRA with its A or B times a number."""
    files = lora_files(folder, seed=folder.name.encode()[0])
    tensors = load_file(files[WEIGHTS])
    for side, scale in sides.items():
        tensors = {name: t * scale if f"lora_{side}." in name else t for name, t in tensors.items()}
    save_file(tensors, files[WEIGHTS])
    return files


def refused(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_delta"), answer.text
    return error


def test_a_delta_that_changes_nothing(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    server.engine.probe = ProbeResult("nothing", "its changes come to nothing, at layers.0.attn.q")
    error = refused(push(tenant, scaled(tmp_path / "a", B=0.0), name="a"))
    assert error["param"] == "layers.0.attn.q/B"
    assert "come to nothing" in error["message"]
    assert "all zero: 'layers.0.attn.q/B'" in error["message"]
    error = refused(push(tenant, scaled(tmp_path / "b"), name="b"))
    assert error["param"] == "file"
    assert "all zero" not in error["message"]
    assert len(server.engine.dropped) == 2
    assert tenant.get("/v1/deltas").json()["data"] == []
    assert tenant.get("/metrics").status_code == 403
    whole = push(tenant, scaled(tmp_path / "c", A=0.0, B=0.0), name="c")
    assert whole.status_code == 201, "a delta of zeros says itself that it does nothing"
    assert list(server.services.upload_folder.iterdir()) == []


def test_a_change_that_is_rounded_away_is_a_change(
    tenant: httpx.Client, server: Running, tmp_path: Path
) -> None:
    server.engine.probe = ProbeResult("rounding", "bfloat16 rounds it away")
    assert push(tenant, scaled(tmp_path / "a"), name="a").status_code == 201
    assert server.engine.dropped == []


@pytest.mark.parametrize("outcome", ["failed", "not_finite"])
def test_a_delta_that_cannot_be_computed(
    tenant: httpx.Client, server: Running, tmp_path: Path, outcome: Any
) -> None:
    server.engine.probe = ProbeResult(outcome, "first at layers.0.attn.q")
    before = quarantines(server)
    assert "layers.0.attn.q" in refused(push(tenant, scaled(tmp_path / "d"), name="a"))["message"]
    assert len(server.engine.dropped) == 1
    assert tenant.get("/v1/deltas").json()["data"] == []
    assert quarantines(server) == before


def quarantines(server: Running) -> float:
    with server.client() as admin:
        lines = admin.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("deltaserve_deltas_quarantined_total ")]
    return float(line.split()[1])


def test_what_is_registered_and_turns_out_poisonous_is_quarantined(
    tenant: httpx.Client, http: httpx.Client, server: Running, tmp_path: Path
) -> None:
    files = scaled(tmp_path / "e")
    mine = push(tenant, files, name="mine").json()
    before = quarantines(server)
    server.engine.probe = ProbeResult("not_finite", "outputs become NaN, first at layers.0.attn.q")
    for _ in range(2):
        refused(push(http, files, name="theirs"))
    assert server.engine.dropped == [], "it may be in use"
    reason = "outputs become NaN, first at layers.0.attn.q"
    assert tenant.get("/v1/deltas/mine").json() == mine | {"status": "quarantined", "status_reason": reason}
    answer = tenant.post("/v1/completions", content=json.dumps({"model": "mine", "prompt": "x"}).encode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "delta_quarantined")
    assert reason in answer.json()["error"]["message"]
    assert quarantines(server) == before + 1
    assert http.get("/v1/deltas/theirs").status_code == 404


def test_nothing_of_it_is_left_when_the_engine_says_no(
    tenant: httpx.Client, server: Running, tmp_path: Path
) -> None:
    server.engine.probe = ProbeResult("failed", "no")
    before = {path for path in server.services.settings.data_dir.rglob("*") if path.is_file()}
    for seed in range(5):
        files = lora_files(tmp_path / str(seed), seed=100 + seed)
        refused(push(tenant, files, name="a"))
    after = {path for path in server.services.settings.data_dir.rglob("*") if path.is_file()}
    assert {path for path in after - before if "valkey" not in path.parts} == set()
