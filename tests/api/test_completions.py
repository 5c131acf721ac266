"""Text completions, tokenization."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.fakes import MAX_MODEL_LEN, NAME
from tests.api.running import Running

PATH = "/v1/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, **fields}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
def test_prompts(http: httpx.Client, server: Running, prompt: Any, expected: list[bytes]) -> None:
    data = http.post(PATH, json=body(prompt=prompt, n=2)).json()
    assert [c["index"] for c in data["choices"]] == list(range(2 * len(expected)))
    assert sorted(bytes(c.prompt) for c in server.engine.calls) == sorted(2 * expected)
    assert data["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert data["object"] == "text_completion"
    assert all(c.sampling.max_tokens == 16 for c in server.engine.calls)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 5, "n": 128}, "n"),
        ({"prompt": "x" * MAX_MODEL_LEN}, "prompt"),
    ],
)
def test_refusals(http: httpx.Client, server: Running, fields: Any, param: str) -> None:
    answer = http.post(PATH, json=body(**fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert server.engine.calls == []


def test_echo_and_logprobs(http: httpx.Client, server: Running) -> None:
    fields = body(prompt="ab", echo=True, logprobs=1, max_tokens=2, best_of=1, suffix=None)
    choice = http.post(PATH, json=fields).json()["choices"][0]
    assert choice["text"] == "abHe"
    assert choice["logprobs"]["tokens"] == ["a", "b", "H", "e"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"H": -0.5}, {"e": -0.5}]
    assert server.engine.calls[0].sampling.prompt_logprobs == 1


def test_scoring_only(http: httpx.Client, server: Running) -> None:
    data = http.post(PATH, json=body(prompt="ab", echo=True, logprobs=0, max_tokens=0)).json()
    choice = data["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert data["usage"]["completion_tokens"] == 0
    assert server.engine.calls[0].sampling.max_tokens == 1


def test_stream(http: httpx.Client) -> None:
    fields = body(prompt=["ab", "cd"], echo=True, stream=True, logprobs=1, return_token_ids=True)
    answer = http.post(PATH, json=fields)
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    for index, prompt in enumerate(("ab", "cd")):
        mine = [c for c in choices if c["index"] == index]
        assert "".join(c["text"] for c in mine) == prompt + "Hello, world!"
        assert mine[-1]["finish_reason"] == "stop"
        offsets = [offset for c in mine for offset in c["logprobs"]["text_offset"]]
        assert offsets == list(range(len(prompt) + 14))
        assert bytes(mine[0]["prompt_token_ids"]).decode() == prompt
        assert len([i for c in mine for i in c["token_ids"]]) == 14


def test_tokenize(http: httpx.Client) -> None:
    data = http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert data == {
        "count": 2,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [97, 98],
        "token_strs": ["a", "b"],
    }
    chat = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    assert http.post("/tokenize", json=chat).json()["tokens"] == [*b"[user]x"]
    assert http.post("/detokenize", json={"tokens": [104, 105]}).json() == {"prompt": "hi"}
    for path, wrong in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": chat["messages"]}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": ["a"]}),
    ):
        assert http.post(path, json=wrong).status_code == 400
    assert http.post("/tokenize", json={"model": "nobody", "prompt": "a"}).status_code == 404
