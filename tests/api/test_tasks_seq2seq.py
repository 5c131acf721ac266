"""Tasks on a tiny T5 behind the command line: the encoder reads the filled template, choices begin the answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.api.command import Server, serving
from tests.api.encoders import refused
from tests.api.tasks import define, infer
from tests.seq2seq import write_t5

EOS = 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    backbone = write_t5(folder / "t5-tiny", "t5_gated", untied=True)
    flags = ("--backbone", str(backbone), "--dtype", "float32", "--threads", "1", "--max-model-len", "100")
    with serving(folder / "data", *flags) as server:
        yield server


def likelihoods(folder: Path, source: list[int], choices: list[list[int]]) -> list[float]:
    """Hugging Face's log-likelihood of each choice as the beginning of the answer."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    found = []
    for choice in choices:
        with torch.no_grad():
            answer = torch.tensor([[0, *choice]])
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=answer).logits[0, :-1]
        found.append(float(logits.log_softmax(-1)[torch.arange(len(choice)), torch.tensor(choice)].sum()))
    return found


def test_classes_and_scores_by_likelihood(tiny: Server) -> None:
    source, choices = [9, 7, 10, 11, EOS], [[20], [21, 22], [23]]
    wanted = likelihoods(tiny.data.parent / "t5-tiny", source, choices)
    labels = {"yes": "w20", "no": "w21 w22", "maybe": "w23"}
    with tiny.http() as http:
        define(http, "nli", "classify", "t5-tiny", template="{p} w7 {h}", labels=labels)
        response = http.post("/v1/tasks/nli/infer", json={"inputs": [{"p": "w9", "h": "w10 w11"}]})
        (output,) = response.json()["outputs"]
        assert [*output["scores"].values()] == pytest.approx(
            torch.tensor(wanted).softmax(0).tolist(), rel=1e-3
        )
        assert response.json()["usage"]["prompt_tokens"] == len(source) + 4
        define(http, "rank", "score", "t5-tiny", template="{p} w7 {h}", labels=labels)
        (ranked,) = infer(http, "rank", {"p": "w9", "h": "w10 w11"})
        assert [*ranked["scores"].values()] == pytest.approx(wanted, rel=1e-4)
        assert ranked["choice"] == output["label"]


def test_texts_are_those_of_completions(tiny: Server) -> None:
    with tiny.http() as http:
        define(http, "write", "generate", "t5-tiny", template="w9 {text}", parameters={"temperature": 0})
        outputs = infer(http, "write", "w10", "w11 " * 200, "w12", max_tokens=5)
        assert outputs[1]["error"]["code"] == "context_length_exceeded"
        for output, text in ((outputs[0], "w9 w10"), (outputs[2], "w9 w12")):
            body = {"model": "t5-tiny", "prompt": text, "temperature": 0, "max_tokens": 5}
            plain = http.post("/v1/completions", json=body).json()["choices"][0]
            assert output == {"text": plain["text"], "finish_reason": plain["finish_reason"]}


def test_what_it_does_not_do(tiny: Server) -> None:
    chat = [{"role": "user", "content": "{text}"}]
    with tiny.http() as http:
        for body, code in (
            ({"kind": "embed"}, "unsupported_task"),
            ({"kind": "tag"}, "unsupported_task"),
            ({"kind": "generate", "template": ["{a}", "{b}"]}, "invalid_request"),
            ({"kind": "generate", "template": chat}, "no_chat_template"),
        ):
            refused(http.post("/v1/tasks", json={"name": "x", "model": "t5-tiny"} | body), code)
