"""Chat completions by raw HTTP and by the stock client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from server.errors import EngineRestarting, RowFailed, Unavailable
from tests.api.fakes import EOS, MAX_MODEL_LEN, NAME
from tests.api.running import ADMIN, Running

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": MESSAGES, **fields}


def events(answer: httpx.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_whole_answer(http: httpx.Client, server: Running) -> None:
    answer = http.post(PATH, json=body())
    assert answer.status_code == 200
    data = answer.json()
    assert data["object"] == "chat.completion"
    assert data["model"] == NAME
    assert data["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello, world!",
        "refusal": None,
    }
    assert data["choices"][0]["finish_reason"] == "stop"
    prompt = len("[user]hi[assistant]")
    assert data["usage"]["prompt_tokens"] == prompt
    assert data["usage"]["completion_tokens"] == len("Hello, world!") + 1
    assert "x-delta-digest" not in answer.headers
    call = server.engine.calls[0]
    assert call.sampling.max_tokens == MAX_MODEL_LEN - prompt
    assert (call.sampling.temperature, call.sampling.top_k) == (1.0, 0)
    assert call.turn.tenant == "default"


def test_stream(http: httpx.Client) -> None:
    chunks = events(http.post(PATH, json=body(stream=True, stream_options={"include_usage": True})))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == "Hello, world!"
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 14
    assert all(c["usage"] is None for c in chunks[:-1])
    assert len({c["id"] for c in chunks}) == 1


def test_multibyte_text_is_never_cut(http: httpx.Client, server: Running) -> None:
    server.engine.reply = "naïve 🚀 café"
    chunks = events(http.post(PATH, json=body(stream=True)))
    texts = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    assert "".join(texts) == "naïve 🚀 café"
    assert not any("\ufffd" in text for text in texts)
    cut = http.post(PATH, json=body(max_tokens=3)).json()
    assert cut["choices"][0]["message"]["content"] == "na\ufffd"
    assert cut["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_never_show(http: httpx.Client, server: Running, stream: bool) -> None:
    answer = http.post(PATH, json=body(stop=[", wo", "zzz"], stream=stream))
    if stream:
        texts = [c["choices"][0]["delta"].get("content", "") for c in events(answer)]
        assert "".join(texts) == "Hello"
    else:
        choice = answer.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")
        assert answer.json()["usage"]["completion_tokens"] == len("Hello, wo")
    assert server.engine.ended.get(timeout=1) == 0


def test_stop_token_has_no_text(http: httpx.Client) -> None:
    answer = http.post(PATH, json=body(stop_token_ids=[ord(",")], return_token_ids=True)).json()
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["choices"][0]["token_ids"] == [*b"Hello,"]
    assert bytes(answer["prompt_token_ids"]) == b"[user]hi[assistant]"


def test_n_rows_with_their_own_seeds(http: httpx.Client, server: Running) -> None:
    data = http.post(PATH, json=body(n=3, seed=7)).json()
    assert [c["index"] for c in data["choices"]] == [0, 1, 2]
    assert sorted(call.sampling.seed or 0 for call in server.engine.calls) == [7, 8, 9]
    assert data["usage"]["prompt_tokens"] == 19
    assert data["usage"]["completion_tokens"] == 3 * 14
    chunks = events(http.post(PATH, json=body(n=2, stream=True)))
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hello, world!"
        assert mine[-1]["finish_reason"] == "stop"


def test_logprobs(http: httpx.Client) -> None:
    data = http.post(PATH, json=body(logprobs=True, top_logprobs=2, max_tokens=2)).json()
    first = data["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("H", -0.5, [72])
    assert [t["token"] for t in first["top_logprobs"]] == ["H", "I"]
    assert len(data["choices"][0]["logprobs"]["content"]) == 2
    chunks = events(http.post(PATH, json=body(logprobs=True, stream=True, max_tokens=2)))
    shown = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [item["content"][0]["token"] for item in shown] == ["H", "e"]


def test_sampling_reaches_the_engine(http: httpx.Client, server: Running) -> None:
    http.post(
        PATH,
        json=body(
            temperature=0,
            top_p=0.5,
            top_k=-1,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            logit_bias={"5": -100},
            ignore_eos=True,
            min_tokens=2,
            max_completion_tokens=4,
            stop_token_ids=[9],
            seed=-3,
        ),
    )
    got = server.engine.calls[0].sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p) == (0, 0.5, 0, 0.1)
    assert (got.presence_penalty, got.frequency_penalty, got.repetition_penalty) == (1, -1, 1.5)
    assert got.logit_bias == {5: -100}
    assert (got.ignore_eos, got.min_tokens, got.max_tokens, got.stop_token_ids) == (True, 2, 4, [9])
    assert got.seed == 2**63 - 3
    assert got.logprobs is None


def test_content_parts_and_roles(http: httpx.Client, server: Running) -> None:
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert http.post(PATH, json=body(messages=messages)).status_code == 200
    assert bytes(server.engine.calls[0].prompt) == b"[system]d[assistant][user]ab[assistant]"


def test_ignored_fields_are_taken(http: httpx.Client) -> None:
    fields = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "tools": None,
        "tool_choice": "none",
        "logit_bias": None,
        "temperature": None,
        "stop": None,
    }
    assert http.post(PATH, json=body(**fields)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"colour": 1}, "colour"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x" * 257]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"model": ""}, "model"),
        ({"model": "a+"}, "model"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, server: Running, fields: Any, param: str) -> None:
    answer = http.post(PATH, json=body(**fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert server.engine.calls == []


def test_missing_model(http: httpx.Client) -> None:
    error = http.post(PATH, json={"messages": MESSAGES}).json()["error"]
    assert error["param"] == "model"
    assert "Missing" in error["message"]


def test_context_is_checked_at_once(http: httpx.Client, server: Running) -> None:
    long = [{"role": "user", "content": "x" * MAX_MODEL_LEN}]
    answer = http.post(PATH, json=body(messages=long))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert server.engine.calls == []
    room = MAX_MODEL_LEN - len("[user][assistant]") - 3
    fits = [{"role": "user", "content": "x" * room}]
    assert http.post(PATH, json=body(messages=fits, max_tokens=100)).status_code == 200
    assert server.engine.calls[0].sampling.max_tokens == 3


def test_unknown_model(http: httpx.Client) -> None:
    answer = http.post(PATH, json=body(model="nobody"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [(RowFailed("boom"), 500), (EngineRestarting("again"), 503), (Unavailable("full"), 503)],
)
def test_failures_before_the_first_token_have_a_status(
    http: httpx.Client, server: Running, stream: bool, failure: Any, status: int
) -> None:
    server.engine.fail_after, server.engine.failure = 0, failure
    answer = http.post(PATH, json=body(stream=stream, n=2))
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == failure.code
    assert ("retry-after" in answer.headers) == (status == 503)


def test_failure_inside_a_stream_is_an_event(http: httpx.Client, server: Running) -> None:
    server.engine.fail_after, server.engine.failure = 3, RowFailed("boom")
    answer = http.post(PATH, json=body(stream=True))
    assert answer.status_code == 200
    chunks = events(answer)
    assert chunks[-1]["error"]["code"] == "row_failed"
    assert "Hel" in "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])


def test_openai_client(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=ADMIN, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).root == NAME
        whole = client.chat.completions.create(model=NAME, messages=MESSAGES, n=2)  # type: ignore[arg-type]
        assert [choice.message.content for choice in whole.choices] == ["Hello, world!"] * 2
        stream = client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 14
        text = client.completions.create(model=NAME, prompt="abc", max_tokens=5)
        assert text.choices[0].text == "Hello"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nobody", messages=MESSAGES)  # type: ignore[arg-type]
        assert missing.value.code == "model_not_found"
        server.engine.fail_after, server.engine.failure = 3, RowFailed("boom")
        with pytest.raises(openai.APIError, match="boom"):
            list(client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True))  # type: ignore[arg-type]


def test_eos_may_be_ignored(http: httpx.Client, server: Running) -> None:
    data = http.post(PATH, json=body(ignore_eos=True, max_tokens=20)).json()
    assert data["choices"][0]["message"]["content"] == ("Hello, world!" * 2)[:20]
    assert EOS not in server.engine.calls[0].prompt
