"""A tiny BERT behind the command line: AdapterHub's own files give its own outputs, and bad requests clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltas.delta import Component, Delta
from tests.api.command import Server, eventually, serving
from tests.api.encoders import close, headed, push, pushed, refused, save
from tests.deltas_of_every_kind import make
from tests.encoders import write_encoder
from tests.oracle.padded import PaddedRow, PaddedRunner

TABLE = Path(__file__).parents[1] / "oracle" / "fixtures" / "adapterhub_table" / "bert"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    backbone = write_encoder(folder / "bert-tiny", "bert")
    flags = ("--backbone", str(backbone), "--dtype", "float32", "--threads", "1")
    with serving(folder / "data", *flags) as server:
        yield server


def test_adapterhubs_head(tiny: Server) -> None:
    """A bottleneck and a classification head, as AdapterHub saved them: its own outputs, and labels in their order."""
    expected = load_file(TABLE / "expected.safetensors")
    rows = [expected[f"ids.{n}"].tolist() for n in range(3)]
    with tiny.http() as http:
        made = pushed(http, "tone", sorted((TABLE / "head_classification").iterdir()))
        assert (made["task_kind"], made["labels"]) == ("classify", ["calm", "angry", "sad"])
        assert http.get("/v1/deltas/tone").json()["labels"] == made["labels"]
        for given in ({}, {"use_activation": True}):
            answer = http.post("/classify", json={"model": "tone", "input": rows} | given).json()
            for n, item in enumerate(answer["data"]):
                probabilities = expected[f"head_classification.{n}"].softmax(0)
                close(item["probs"], probabilities)
                assert item["label"] == made["labels"][int(probabilities.argmax())]
                assert (item["index"], item["num_classes"]) == (n, 3)
        response = http.post("/classify", json={"model": "tone", "input": rows, "use_activation": False})
        for n, item in enumerate(response.json()["data"]):
            close(item["probs"], expected[f"head_classification.{n}"])
        assert response.headers["x-delta-digest"] == made["digest"]
        assert response.json()["usage"] == {"prompt_tokens": 15, "total_tokens": 15, "completion_tokens": 0}
        tags = pushed(http, "tags", sorted((TABLE / "head_tagging").iterdir()))
        assert tags["task_kind"] == "tag"
        assert "every token" in refused(
            http.post("/classify", json={"model": "tags", "input": "w7"}), "unsupported_task"
        )


def test_regression_and_sums(tiny: Server, tmp_path: Path) -> None:
    runner = PaddedRunner("bert")
    body, value = make(runner.spec, "lora", 1), headed(make(runner.spec, "bitfit", 2), 1, 32, "regress")
    ids = [3, 9, 11, 4]
    with tiny.http() as http:
        pushed(http, "body", save(tmp_path, "body", body))
        assert pushed(http, "value", save(tmp_path, "value", value))["task_kind"] == "regress"
        (item,) = http.post("/classify", json={"model": "value", "input": "w9 w11"}).json()["data"]
        close(item["probs"], runner.classes([PaddedRow(ids, runner.place(value))])[0])
        assert item["label"] is None
        (item,) = http.post("/classify", json={"model": "value+body", "input": "w9 w11"}).json()["data"]
        close(item["probs"], runner.classes([PaddedRow(ids, runner.place(value, body))])[0])
        refused(http.post("/classify", json={"model": "body", "input": "w9"}), "unsupported_task")
        refused(http.post("/classify", json={"model": "bert-tiny", "input": "w9"}), "unsupported_task")
        two = http.post("/classify", json={"model": "value+value", "input": "w9"})
        assert "a sum can have one" in refused(two, "unsupported_task")


def test_an_encoder_does_not_generate(tiny: Server) -> None:
    with tiny.http() as http:
        for path, body in (
            ("/v1/completions", {"prompt": "w9"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w9"}]}),
        ):
            assert "/v1/embeddings" in refused(
                http.post(path, json={"model": "bert-tiny"} | body), "unsupported_task"
            )
        assert http.get("/v1/models").json()["data"][0]["id"] == "bert-tiny"
        assert http.post("/tokenize", json={"prompt": "w9 w10"}).json()["tokens"] == [3, 9, 10, 4]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input": ""}, "invalid_request", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": ["w9", ""]}, "invalid_request", "input"),
        ({"input": [[]]}, "invalid_request", "input"),
        ({"input": [5, 1000]}, "invalid_request", "input"),
        ({"input": ["w9"] * 2049}, "invalid_request", "input"),
        ({"input": "w9 " * 47}, "context_length_exceeded", "input"),
        ({"input": [9] * 49}, "context_length_exceeded", "input"),
        ({"input": "w9", "dimensions": 8}, "invalid_request", "dimensions"),
        ({"input": "w9", "encoding_format": "hex"}, "invalid_request", "encoding_format"),
        ({"input": "w9", "truncate_prompt_tokens": 0}, "invalid_request", "truncate_prompt_tokens"),
        ({"input": "w9", "truncate_prompt_tokens": 49}, "invalid_request", "truncate_prompt_tokens"),
        ({"input": "w9 w9", "truncate_prompt_tokens": 2}, "invalid_request", "truncate_prompt_tokens"),
        ({"input": "w9", "colour": "red"}, "invalid_request", "colour"),
        ({"input": "w9", "model": "nobody"}, "model_not_found", "model"),
    ],
)
def test_bad_requests(tiny: Server, change: dict[str, Any], code: str, param: str) -> None:
    with tiny.http() as http:
        response = http.post("/v1/embeddings", json={"model": "bert-tiny"} | change)
        refused(response, code, 404 if code == "model_not_found" else 400)
        assert response.json()["error"]["param"] == param


def test_inputs_of_every_form_and_cut_ones(tiny: Server) -> None:
    """Texts, lists, token ids; cut at the end, with the control tokens kept."""
    with tiny.http() as http:

        def embed(given: Any, **more: Any) -> list[list[float]]:
            answer = http.post("/v1/embeddings", json={"model": "bert-tiny", "input": given} | more).json()
            return [item["embedding"] for item in answer["data"]]

        (one,) = embed("w9 w10 w11")
        assert embed(["w9 w10 w11", "w9"])[0] == pytest.approx(one, abs=1e-6)
        assert embed([3, 9, 10, 11, 4])[0] == pytest.approx(one, abs=1e-6)
        assert embed([[3, 9, 10, 11, 4], [5]])[0] == pytest.approx(one, abs=1e-6)
        assert embed("w9 w10 w11 w12 w13", truncate_prompt_tokens=5)[0] == pytest.approx(one, abs=1e-6)
        assert embed([3, 9, 10, 11, 4, 8], truncate_prompt_tokens=5)[0] == pytest.approx(one, abs=1e-6)
        assert embed("w9 w10", add_special_tokens=False)[0] == pytest.approx(embed([9, 10])[0], abs=1e-6)
        assert len(embed("w9 " * 500, truncate_prompt_tokens=-1)[0]) == 32
        assert embed(["w9"] * 600)[599] == pytest.approx(embed("w9")[0], abs=1e-6)  # several waves


def test_an_upload_is_tried(tiny: Server, tmp_path: Path) -> None:
    poison = Delta((Component("bitfit", {}, {"layers.0.mlp.down/beta": torch.full((32,), 3e38)}),))
    with tiny.http() as http:
        response = push(http, "poison", save(tmp_path, "poison", poison))
        assert "NaN or infinite" in refused(response, "invalid_delta")


def test_a_dead_engine_comes_back(tiny: Server, tmp_path: Path) -> None:
    delta = make(PaddedRunner("bert").spec, "lora", 9)
    with tiny.http() as http:
        pushed(http, "again", save(tmp_path, "again", delta))
        body = {"model": "again", "input": ["w9 w10", "w8"]}
        before = http.post("/v1/embeddings", json=body).json()["data"]
        tiny.engine.kill()
        tiny_ready(tiny)
        assert http.post("/v1/embeddings", json=body).json()["data"] == before


def tiny_ready(server: Server) -> None:
    """Waits until the engine has died and another is there."""
    with server.http() as http:
        eventually(lambda: http.get("/health/ready").status_code == 503, within=30, what="the engine's death")
    server.wait_ready()
