"""Tasks on a tiny BERT behind the command line: each kind, and scores of pairs, as Hugging Face's own model has them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from deltas import heads
from deltas.delta import Component, Delta
from tests.api.encoders import close, pushed, refused, save
from tests.api.tasks import TinyBert, define, infer, row, tiny_bert
from tests.deltas_of_every_kind import make
from tests.encoders import SPECIAL
from tests.oracle.padded import PaddedRow

CLS, SEP, MASK = SPECIAL["[CLS]"], SPECIAL["[SEP]"], SPECIAL["[MASK]"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyBert]:
    with tiny_bert(tmp_path_factory.mktemp("tiny")) as found:
        yield found


def test_classes_by_heads_of_many_sizes_at_once(tiny: TinyBert) -> None:
    with tiny.server.http() as http:
        for name in ("two", "five", "many"):
            define(http, f"class-{name}", "classify", name, template="w7 {a} w8 {b}")

        def ask(name: str) -> list[dict[str, Any]]:
            return infer(http, f"class-{name}", {"a": "w9 w10", "b": "w11"}, {"a": "w12", "b": "w13"})

        with ThreadPoolExecutor() as pool:
            answers = dict(zip(("two", "five", "many"), pool.map(ask, ("two", "five", "many")), strict=True))
        for name, outputs in answers.items():
            for output, ids in zip(outputs, (row(7, 9, 10, 8, 11), row(7, 12, 8, 13)), strict=True):
                wanted = tiny.wanted(name, ids).softmax(0)
                close([*output["scores"].values()], wanted)
                best = int(wanted.argmax())
                assert output["label"] == f"class {best}" == [*output["scores"]][best]
                assert output["score"] == output["scores"][output["label"]]


def test_the_answer_and_named_labels(tiny: TinyBert) -> None:
    with tiny.server.http() as http:
        define(http, "moods", "classify", "two@1", labels=["good", "bad"])
        response = http.post("/v1/tasks/moods/infer", json={"inputs": ["w9", "w10 w11"]})
        answer = response.json()
        assert (answer["task"], answer["model"]) == ("moods", "two@1")
        assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
        assert {*answer["outputs"][0]["scores"]} == {"good", "bad"}
        assert response.headers["x-delta-digest"] == tiny.deltas["two"].digest
        refused(
            http.post(
                "/v1/tasks", json={"name": "x", "kind": "classify", "model": "two", "labels": ["a", "b", "c"]}
            ),
            "invalid_request",
        )
        text = http.get("/metrics").text
        assert 'deltaserve_requests_total{kind="task",outcome="ok"}' in text


def test_values_and_embeddings(tiny: TinyBert) -> None:
    with tiny.server.http() as http:
        define(http, "value", "regress", "value")
        (output,) = infer(http, "value", "w9 w11")
        close([output["value"]], tiny.wanted("value", row(9, 11)))
        define(http, "vectors", "embed", "body", template="w20 {text}", parameters={"pooling": "max"})
        tiny.runner.logits([PaddedRow(row(20, 9), tiny.runner.place(tiny.deltas["body"]))])
        states = tiny.runner.hidden[0]
        for given, wanted in (
            ({}, states.amax(0)),
            ({"pooling": "mean"}, states.mean(0)),
            ({"pooling": "cls", "normalize": True}, torch.nn.functional.normalize(states[0], dim=0)),
        ):
            close(infer(http, "vectors", "w9", **given)[0]["embedding"], wanted)


@pytest.mark.parametrize("model", ["bert-tiny", "body"])
def test_classes_by_words_at_a_mask(tiny: TinyBert, model: str) -> None:
    words = {"yes": ["w20", "w21"], "no": ["w22"], "maybe": "w23"}
    with tiny.server.http() as http:
        define(http, f"nli-{model}", "classify", model, template="{p} w7 [MASK] , {h}", labels=words)
        outputs = infer(http, f"nli-{model}", {"p": "w9", "h": "w10 w11"}, {"p": "w12 w13", "h": "w14"})
        for output, ids in zip(
            outputs, (row(9, 7, MASK, 2, 10, 11), row(12, 13, 7, MASK, 2, 14)), strict=True
        ):
            logprobs = mask_logits(tiny, ids, model).log_softmax(0)
            means = torch.stack([logprobs[[20, 21]].mean(), logprobs[22], logprobs[23]])
            close([*output["scores"].values()], means.softmax(0))
            assert [*output["scores"]] == ["yes", "no", "maybe"]
        plain = infer(http, f"nli-{model}", {"p": "w9 [MASK] [SEP]", "h": "w10"})[0]
        ids = row(9, 2, 2, 2, 2, 2, 2, 7, MASK, 2, 10)  # brackets are no words here, and no control tokens
        assert plain["scores"]["no"] == pytest.approx(words_alone(mask_logits(tiny, ids, model)), rel=1e-4)


def mask_logits(tiny: TinyBert, ids: list[int], model: str) -> Tensor:
    """Hugging Face's logits at the mask."""
    if model == "bert-tiny":
        masked = AutoModelForMaskedLM.from_pretrained(tiny.folder).eval()
        with torch.no_grad():
            return masked(torch.tensor([ids])).logits[0, ids.index(MASK)]
    placed = tiny.runner.place(tiny.deltas[model])
    return tiny.runner.logits([PaddedRow(ids, placed)])[0][ids.index(MASK)]


def words_alone(logits: Tensor) -> float:
    logprobs = logits.log_softmax(0)
    return float(torch.stack([logprobs[[20, 21]].mean(), logprobs[22], logprobs[23]]).softmax(0)[1])


def test_spans_of_tagged_words(tiny: TinyBert) -> None:
    """The head's own outputs word by word; how words become spans has tests of its own."""
    text = "w9  w10 w11 w12, w13"
    places = [(0, 2), (4, 7), (8, 11), (12, 15), (15, 16), (17, 20)]
    ids = row(9, 10, 11, 12, 2, 13)
    tiny.runner.logits([PaddedRow(ids, tiny.runner.place(tiny.deltas["tags"]))])
    head = tiny.runner.place(tiny.deltas["tags"]).head
    assert head is not None
    lines = heads.apply(head, tiny.runner.hidden[0])[1:-1].softmax(-1)
    labels = [int(line.argmax()) for line in lines]
    with tiny.server.http() as http:
        define(http, "each", "tag", "tags", labels=["O", "S-a", "S-b"])  # every word is a span of its own
        (output,) = infer(http, "each", text)
        wanted = [
            {
                "start": start,
                "end": end,
                "label": "ab"[label - 1],
                "score": pytest.approx(float(line[label]), rel=1e-4),
            }
            for (start, end), label, line in zip(places, labels, lines, strict=True)
            if label > 0
        ]
        assert wanted
        assert output["spans"] == wanted
        assert infer(http, "each", {"text": text})[0] == output
        cut = infer(http, "each", text, truncate_prompt_tokens=4)[0]["spans"]
        assert all(span["end"] <= 7 for span in cut)
        body = {"name": "x", "kind": "tag", "model": "tags", "template": "{text}"}
        assert "has none" in refused(http.post("/v1/tasks", json=body), "invalid_request")


def test_pairs_have_token_types(tiny: TinyBert) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny.folder).eval().base_model
    ids, types = [CLS, 9, 10, SEP, 11, SEP], [0, 0, 0, 0, 1, 1]
    with torch.no_grad():
        states = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).last_hidden_state[0]
    with tiny.server.http() as http:
        define(http, "pair", "embed", "bert-tiny", template=["{a} w10", "{b}"])
        close(infer(http, "pair", {"a": "w9", "b": "w11"})[0]["embedding"], states.mean(0))
        (long,) = infer(http, "pair", {"a": "w9", "b": "w11 " * 50}, truncate_prompt_tokens=7)
        (short,) = infer(http, "pair", {"a": "w9", "b": "w11 w11"})
        assert long == short


def test_scores_of_pairs(tiny: TinyBert) -> None:
    """vLLM's ``/score``: by embeddings, and by a head that reads the pair."""
    with tiny.server.http() as http:

        def vector(text: str) -> Tensor:
            answer = http.post("/v1/embeddings", json={"model": "body", "input": text}).json()
            return torch.tensor(answer["data"][0]["embedding"])

        body = {"model": "body", "text_1": "w9", "text_2": ["w10 w11", "w9", "w12"]}
        response = http.post("/score", json=body)
        answer = response.json()
        wanted = [torch.cosine_similarity(vector("w9"), vector(text), 0) for text in body["text_2"]]
        close([item["score"] for item in answer["data"]], torch.stack(wanted))
        assert [(item["index"], item["object"]) for item in answer["data"]] == [
            (0, "score"),
            (1, "score"),
            (2, "score"),
        ]
        assert (answer["object"], answer["model"]) == ("list", "body")
        assert answer["usage"]["prompt_tokens"] == 3 + 4 + 3
        assert response.headers["x-delta-digest"] == tiny.deltas["body"].digest
        pairs = {"model": "body", "queries": ["w9", "w10"], "documents": ["w9", "w12"]}
        scores = [item["score"] for item in http.post("/score", json=pairs).json()["data"]]
        assert scores[0] == pytest.approx(1, abs=1e-5)
        raw = http.post("/score", json=body | {"model": "value", "use_activation": False}).json()["data"]
        squashed = http.post("/score", json=body | {"model": "value"}).json()["data"]
        close([item["score"] for item in squashed], torch.tensor([item["score"] for item in raw]).sigmoid())
        refused(http.post("/score", json=body | {"model": "two"}), "unsupported_task")
        refused(http.post("/score", json=body | {"model": "tags"}), "unsupported_task")
        refused(http.post("/score", json=body | {"text_1": ["w9", "w9"]}), "invalid_request")
        refused(http.post("/score", json=body | {"text_2": "w9 " * 50}), "context_length_exceeded")


def test_a_head_without_names(tiny: TinyBert, tmp_path: Path) -> None:
    """Its labels are numbered, or the task's; names for another number of outputs fail the call."""
    config = {"kind": "classify", "pooling": "mean", "activations": ["identity"], "labels": None}
    head = Component("head", config, {"layers.0/weight": torch.randn(2, 32)})
    nameless = Delta((*make(tiny.runner.spec, "lora", 9).components, head))
    with tiny.server.http() as http:
        pushed(http, "nameless", save(tmp_path, "nameless", nameless))
        define(http, "numbered", "classify", "nameless")
        define(http, "named", "classify", "nameless", labels=["no", "yes"])
        define(http, "miscounted", "classify", "nameless", labels=["no", "yes", "maybe"])
        (numbered,), (named,) = infer(http, "numbered", "w9"), infer(http, "named", "w9")
        assert [*numbered["scores"]] == ["LABEL_0", "LABEL_1"]
        assert [*named["scores"]] == ["no", "yes"]
        assert [*named["scores"].values()] == pytest.approx([*numbered["scores"].values()], rel=1e-6)
        response = http.post("/v1/tasks/miscounted/infer", json={"inputs": ["w9"]})
        assert "2 outputs" in refused(response, "unsupported_task")
