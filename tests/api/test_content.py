"""A version's content in PEFT's form."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from deltas.delta import Component, Delta
from deltas.formats import native
from tests.api.fakes import NAME
from tests.api.running import HIDDEN, Running, lora_files, push


@pytest.fixture
def tenant(server: Running) -> Iterator[httpx.Client]:
    """A client with a fresh tenant's key."""
    name = f"t-{os.urandom(6).hex()}"
    with server.client() as admin:
        key = admin.post("/v1/tenants", json={"name": name}).json()["key"]
    with server.client(key, params={}) as client:
        yield client


def members(answer: httpx.Response, folder: Path) -> dict[str, Path]:
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["content-length"]) == len(answer.content)
    folder.mkdir()
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(folder, filter="data")
        return {name: folder / name for name in archive.getnames()}


def test_content_in_pefts_form(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    sent = lora_files(tmp_path / "sent")
    made = push(tenant, sent, name="a", metadata='{"base_model_name_or_path": "org/tiny"}').json()
    answer = tenant.get("/v1/deltas/a/versions/1/content?format=peft")
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["x-delta-digest"] == made["digest"]
    assert answer.headers["content-disposition"] == 'attachment; filename="a-1.peft.tar"'
    got = members(answer, tmp_path / "got")
    assert sorted(got) == sorted(sent)
    before, after = (load_file(files["adapter_model.safetensors"]) for files in (sent, got))
    assert set(before) == set(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    config = json.loads(got["adapter_config.json"].read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    assert config["base_model_name_or_path"] == "org/tiny"
    same = push(tenant, got, name="b").json()
    assert same["digest"] == made["digest"]
    again = tenant.get("/v1/deltas/b/versions/1/content?format=peft")
    config = json.loads(members(again, tmp_path / "again")["adapter_config.json"].read_text())
    assert config["base_model_name_or_path"] == NAME
    assert list(server.services.upload_folder.iterdir()) == []


def test_what_peft_has_not_is_a_conflict(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    site = "layers.0.mlp.out"
    tensors = {f"{site}/down": torch.ones(2, HIDDEN), f"{site}/up": torch.ones(HIDDEN, 2)}
    tensors |= {f"{site}/down_bias": torch.ones(2), f"{site}/up_bias": torch.ones(HIDDEN)}
    config = {"activation": "relu", "reads": "output", "scale": 1.0}
    path = tmp_path / native.WEIGHTS
    native.save(Delta((Component("bottleneck", config, tensors),)), path)
    assert push(tenant, {native.WEIGHTS: path}, name="a").status_code == 201
    answer = tenant.get("/v1/deltas/a/versions/1/content?format=peft")
    assert answer.status_code == 409, answer.text
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("conflict", "format")
    assert "component 0 (bottleneck): PEFT has no adapters of this kind" in error["message"]
    assert tenant.get("/v1/deltas/a/versions/1/content").status_code == 200
    assert list(server.services.upload_folder.iterdir()) == []


def test_bad_requests_for_content(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    made = push(tenant, lora_files(tmp_path / "a"), name="a").json()
    answer = tenant.get("/v1/deltas/a/versions/1/content?format=gguf")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "format")
    assert tenant.get("/v1/deltas/a/versions/2/content?format=peft").status_code == 404
    assert tenant.get("/v1/deltas/other/versions/1/content?format=peft").status_code == 404
    server.services.blobs.path(made["digest"]).unlink()
    for form in ("native", "peft"):
        gone = tenant.get(f"/v1/deltas/a/versions/1/content?format={form}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_several_at_once(tenant: httpx.Client, tmp_path: Path) -> None:
    """More requests than conversions run at a time; each gets the whole of its own."""
    for seed in range(3):
        push(tenant, lora_files(tmp_path / str(seed), seed=seed), name=f"d{seed}")

    def weights(seed: int) -> bytes:
        answer = tenant.get(f"/v1/deltas/d{seed}/versions/1/content?format=peft")
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            file = archive.extractfile("adapter_model.safetensors")
            assert file is not None
            return file.read()

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(weights, [0, 1, 2] * 4))
    assert results == results[:3] * 4
    assert len(set(results)) == 3
