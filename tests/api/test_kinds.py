"""What a backbone and a delta are for: asking a decoder for vectors, or a classifier for text, is a clear error."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from deltas.delta import Component, Delta
from deltas.formats import native
from tests.api.fakes import NAME
from tests.api.running import HIDDEN, SPEC, push
from tests.tiny import random_delta


def save(folder: Path, kind: str, labels: list[str] | None) -> dict[str, Path]:
    """A LoRA with a head."""
    outputs = len(labels or ["value"])
    config = {"kind": kind, "pooling": "last", "activations": ["identity"], "labels": labels}
    head = Component("head", config, {"layers.0/weight": torch.ones(outputs, HIDDEN)})
    path = folder / native.WEIGHTS
    native.save(Delta((*random_delta(SPEC, "lora", 1).components, head)), path)
    return {path.name: path}


@pytest.mark.parametrize(("path", "field"), [("/v1/embeddings", "input"), ("/classify", "input")])
def test_a_decoder_does_not_encode(http: httpx.Client, path: str, field: str) -> None:
    response = http.post(path, json={"model": NAME, field: "Hello"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_task", "model")
    assert "/v1/completions" in error["message"]


@pytest.mark.parametrize(
    ("kind", "labels"), [("classify", ["no", "yes"]), ("tag", ["O", "B", "I"]), ("regress", None)]
)
def test_a_delta_with_a_head_does_not_generate(
    http: httpx.Client, tmp_path: Path, kind: str, labels: list[str] | None
) -> None:
    made = push(http, save(tmp_path, kind, labels), name=f"judge-{kind}").json()
    assert (made["task_kind"], made["labels"]) == (kind, labels)
    listed = {item["name"]: item for item in http.get("/v1/deltas").json()["data"]}
    assert listed[f"judge-{kind}"]["labels"] == labels
    for path, body in (
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ):
        for model in (made["name"], f"{made['name']}@1", f"{made['name']}*0.5"):
            error = http.post(path, json={"model": model} | body).json()["error"]
            assert error["code"] == "unsupported_task"
            assert f"task head ({kind})" in error["message"]
