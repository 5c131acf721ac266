"""Tasks as things: defined, listed, shown, forgotten; what an answer is made of. The engine is a stand-in."""

from __future__ import annotations

import json
import shlex
from typing import Any

import httpx
import pytest

from server.errors import EngineRestarting, InvalidComposition, RowFailed
from tests.api.encoders import refused
from tests.api.fakes import NAME
from tests.api.running import Running
from tests.api.tasks import define, infer

BODY = {"name": "greet", "kind": "generate", "model": NAME, "template": "Say {what} to {whom}"}


@pytest.fixture(autouse=True)
def without_tasks(http: httpx.Client) -> None:
    for task in http.get("/v1/tasks").json()["data"]:
        assert http.delete(f"/v1/tasks/{task['name']}").status_code == 200


def test_the_life_of_a_task(http: httpx.Client) -> None:
    made = http.post("/v1/tasks", json=BODY | {"parameters": {"max_tokens": 3}})
    assert made.status_code == 201
    task = made.json()
    assert {key: task[key] for key in ("id", "object", "name", "kind", "model", "template", "labels")} == {
        "id": "greet",
        "object": "task",
        "name": "greet",
        "kind": "generate",
        "model": NAME,
        "template": "Say {what} to {whom}",
        "labels": None,
    }
    assert http.get("/v1/tasks/greet").json() == task
    listed = http.get("/v1/tasks").json()
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert [item["name"] for item in listed["data"]] == ["greet"]
    assert http.delete("/v1/tasks/greet").json() == {"id": "greet", "object": "task", "deleted": True}
    for response in (
        http.get("/v1/tasks/greet"),
        http.delete("/v1/tasks/greet"),
        http.post("/v1/tasks/greet/infer", json={"inputs": ["x"]}),
    ):
        refused(response, "not_found", 404)


def test_the_example_works_as_it_stands(http: httpx.Client, server: Running) -> None:
    example = define(http, **BODY)["example"]
    words = shlex.split(example["curl"])
    url, data = words[1], words[words.index("-d") + 1]
    assert url == f"{server.url}/v1/tasks/greet/infer"
    assert json.loads(data) == example["request"]
    answer = http.post(url, json=json.loads(data)).json()
    assert {*answer["outputs"][0]} == {"text", "finish_reason"}
    for kind, more in (
        ("score", {"template": None}),
        ("score", {"labels": ["a", "b"]}),
        ("classify", {"labels": {"it's": "a"}, "template": "{x} ?"}),
    ):
        task = define(http, **(BODY | {"name": f"{kind}-{len(more)}", "kind": kind} | more))
        outputs = infer(http, task["name"], *task["example"]["request"]["inputs"])
        (alternative, _) = task["output"]["anyOf"]
        assert {*outputs[0]} == {*alternative["required"]}
        http.delete(f"/v1/tasks/{task['name']}")


def test_schemas_of_inputs(http: httpx.Client) -> None:
    text = {"type": "string", "minLength": 1}
    one = define(http, "one", "generate", NAME)["input"]
    assert one["anyOf"] == [
        text,
        {"type": "object", "properties": {"text": text}, "required": ["text"], "additionalProperties": False},
    ]
    assert define(http, **BODY)["input"]["required"] == ["what", "whom"]
    assert define(http, "open", "score", NAME)["input"]["required"] == ["text", "choices"]
    named = define(http, "named", "score", NAME, labels=["a"])["input"]["anyOf"][1]
    assert (named["required"], {*named["properties"]}) == (["text"], {"text", "choices"})


def test_a_name_is_defined_once(http: httpx.Client) -> None:
    first = define(http, **BODY)
    again = http.post("/v1/tasks", json=BODY)
    assert (again.status_code, again.json()) == (200, first)
    other = http.post("/v1/tasks", json=BODY | {"template": "{what}"})
    refused(other, "conflict", 409)
    assert other.headers["x-should-retry"] == "false"
    assert http.get("/v1/tasks/greet").json() == first


def test_idempotency(http: httpx.Client) -> None:
    headers = {"idempotency-key": "once"}
    first = http.post("/v1/tasks", json=BODY, headers=headers)
    http.delete("/v1/tasks/greet")
    again = http.post("/v1/tasks", json=BODY, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    refused(http.get("/v1/tasks/greet"), "not_found", 404)
    refused(http.post("/v1/tasks", json=BODY | {"name": "b"}, headers=headers), "key_reused", 409)


def test_tenants_do_not_see_each_other(http: httpx.Client, server: Running) -> None:
    define(http, **BODY)
    http.post("/v1/tenants", json={"name": "south"})
    key = http.post("/v1/tenants/south/keys", json={}).json()["key"]
    with server.client(key) as south:
        for response in (
            south.get("/v1/tasks/greet"),
            south.delete("/v1/tasks/greet"),
            south.post("/v1/tasks/greet/infer", json={"inputs": ["x"]}),
        ):
            refused(response, "not_found", 404)
        assert south.get("/v1/tasks").json()["data"] == []
        define(south, **(BODY | {"template": "{mine}"}))
        assert south.get("/v1/tasks/greet").json()["template"] == "{mine}"
        infer(south, "greet", "x")
    assert server.engine.calls[-1].turn.tenant == "south"
    assert http.get("/v1/tasks/greet").json()["template"] == BODY["template"]


def test_pages(http: httpx.Client) -> None:
    for name in ("b", "a", "c"):
        define(http, name, "generate", NAME)
    page = http.get("/v1/tasks", params={"limit": 2}).json()
    assert ([item["name"] for item in page["data"]], page["has_more"]) == (["b", "a"], True)
    rest = http.get("/v1/tasks", params={"after": "a"}).json()
    assert [item["name"] for item in rest["data"]] == ["c"]
    refused(http.get("/v1/tasks", params={"after": "x"}), "invalid_request")


def test_parameters_of_the_task_and_of_the_call(http: httpx.Client, server: Running) -> None:
    define(http, "p", "generate", NAME, parameters={"temperature": 0.5, "max_tokens": 4, "seed": 7})
    infer(http, "p", "x", "y", max_tokens=2, stop=["zz"])
    for call in server.engine.calls:
        assert (call.sampling.temperature, call.sampling.max_tokens, call.sampling.seed) == (0.5, 2, 7)
    for parameters, param in (
        ({"temperature": 3}, "parameters.temperature"),
        ({"colour": 1}, "parameters.colour"),
        ({"min_tokens": 5}, "min_tokens"),
    ):
        response = http.post("/v1/tasks/p/infer", json={"inputs": ["x"], "parameters": parameters})
        refused(response, "invalid_request")
        assert response.json()["error"]["param"] == param


def test_values_come_into_the_prompt_as_they_are(http: httpx.Client, server: Running) -> None:
    define(http, **BODY)
    infer(http, "greet", {"what": "{whom} {{ 7*7 }}", "whom": "{what!r}"})
    assert bytes(server.engine.calls[-1].prompt).decode() == "Say {whom} {{ 7*7 }} to {what!r}"


def test_a_failed_row_is_its_own(http: httpx.Client, server: Running) -> None:
    define(http, "one", "generate", NAME)
    server.engine.fail_after, server.engine.failure = 0, RowFailed("no number")
    (output,) = infer(http, "one", "x")
    assert output["error"] == {
        "message": "no number",
        "type": "server_error",
        "param": None,
        "code": "row_failed",
    }


@pytest.mark.parametrize(
    ("failure", "status"), [(EngineRestarting("gone"), 503), (InvalidComposition("no sum"), 400)]
)
def test_what_is_no_rows_fault_fails_the_call(
    http: httpx.Client, server: Running, failure: Any, status: int
) -> None:
    define(http, "one", "generate", NAME)
    server.engine.fail_after, server.engine.failure = 0, failure
    response = http.post("/v1/tasks/one/infer", json={"inputs": ["x", "y"]})
    refused(response, failure.code, status)


def test_a_client_that_hangs_up_frees_its_rows(http: httpx.Client, server: Running) -> None:
    define(http, "one", "generate", NAME)
    server.engine.hang_after = 1
    with pytest.raises(httpx.ReadTimeout), server.client() as impatient:
        impatient.post("/v1/tasks/one/infer", json={"inputs": ["x"] * 3}, timeout=1)
    assert [server.engine.ended.get(timeout=10) for _ in range(3)][-1] == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": ""}, "name"),
        ({"kind": "paint"}, "kind"),
        ({"template": "{a.b}"}, "template"),
        ({"template": "nothing"}, "template"),
        ({"template": ["{a}"]}, "template"),
        ({"template": ["{a}", "{b}", "{c}"]}, "template"),
        ({"template": [{"role": "user"}]}, "template.0.content"),
        ({"template": [{"role": "wizard", "content": "{a}"}]}, "template.0.role"),
        ({"template": []}, "template"),
        ({"template": "{a}" + "x" * 65_536}, "template"),
        ({"kind": "score", "labels": []}, "labels"),
        ({"kind": "score", "labels": ["a", "a"]}, "labels"),
        ({"kind": "score", "labels": {"a": []}}, "labels"),
        ({"kind": "score", "labels": ["a"] * 1025}, "labels"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_definitions(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    response = http.post("/v1/tasks", json=BODY | change)
    refused(response, "invalid_request")
    assert str(response.json()["error"]["param"]).startswith(param)
    assert http.get("/v1/tasks").json()["data"] == []


@pytest.mark.parametrize(
    "body", [{}, {"inputs": []}, {"inputs": "x"}, {"inputs": ["x"] * 2049}, {"inputs": ["x"], "model": "y"}]
)
def test_bad_calls(http: httpx.Client, body: dict[str, Any]) -> None:
    define(http, "one", "generate", NAME)
    refused(http.post("/v1/tasks/one/infer", json=body), "invalid_request")


def test_a_decoder_scores_no_pairs(http: httpx.Client) -> None:
    response = http.post("/score", json={"model": NAME, "text_1": "a", "text_2": "b"})
    refused(response, "unsupported_task")
