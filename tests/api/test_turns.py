"""When a request's rows have their turn: the tenant's weight, the request's priority, and what waits too long."""

from __future__ import annotations

import httpx
import pytest

from server.errors import QueueTimeout
from server.types import Turn
from tests.api.fakes import NAME
from tests.api.running import Running

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
TEXT = ("/v1/completions", {"prompt": "x"})
both = pytest.mark.parametrize(("path", "more"), [CHAT, TEXT], ids=["chat", "completions"])


def ask(http: httpx.Client, path: str, more: dict[str, object], **fields: object) -> httpx.Response:
    return http.post(path, json={"model": NAME, **more, **fields})


def rejections(http: httpx.Client) -> float:
    name = 'deltaserve_admission_rejections_total{reason="queue_timeout"}'
    lines = http.get("/metrics").text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(name)), 0.0)


def test_a_new_weight_counts_from_the_next_request_on(http: httpx.Client, server: Running) -> None:
    key = http.post("/v1/tenants", json={"name": "gold", "limits": {"weight": 3}}).json()["key"]
    with server.client(key) as gold:
        for limits, weight in (({}, 3.0), ({"weight": 0.5}, 0.5), ({"weight": None}, 1.0)):
            assert http.patch("/v1/tenants/gold", json={"limits": limits}).status_code == 200
            assert ask(gold, *TEXT).status_code == 200
            assert server.engine.calls[-1].turn == Turn("gold", weight)
    assert ask(http, *TEXT).status_code == 200
    assert server.engine.calls[-1].turn == Turn("default")


@pytest.mark.parametrize("weight", [0, 0.0005, 1001, -1])
def test_a_weight_out_of_bounds_is_refused(http: httpx.Client, weight: float) -> None:
    answer = http.patch("/v1/tenants/default", json={"limits": {"weight": weight}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limits.weight"


@both
def test_priority_reaches_every_row(
    http: httpx.Client, server: Running, path: str, more: dict[str, object]
) -> None:
    for priority in (7, -(2**63), None):
        server.engine.calls.clear()
        assert ask(http, path, more, priority=priority, n=2).status_code == 200
        assert [call.turn for call in server.engine.calls] == [Turn("default", 1.0, priority or 0)] * 2


@both
@pytest.mark.parametrize("priority", [2**63, -(2**63) - 1, 1.5, "1", True])
def test_a_priority_out_of_bounds_is_refused(
    http: httpx.Client, path: str, more: dict[str, object], priority: object
) -> None:
    answer = ask(http, path, more, priority=priority)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "priority"


def test_a_tasks_rows_have_its_priority_or_the_calls(http: httpx.Client, server: Running) -> None:
    task = {"name": "later", "kind": "generate", "model": NAME, "parameters": {"priority": 5}}
    assert http.post("/v1/tasks", json=task).status_code == 201
    for parameters, priority in (({}, 5), ({"priority": -1}, -1)):
        body = {"inputs": ["a", "b"], "parameters": parameters}
        assert http.post("/v1/tasks/later/infer", json=body).status_code == 200
        assert [call.turn.priority for call in server.engine.calls[-2:]] == [priority] * 2
    refused = http.post("/v1/tasks/later/infer", json={"inputs": ["a"], "parameters": {"priority": "x"}})
    assert refused.json()["error"]["param"] == "parameters.priority"


@both
@pytest.mark.parametrize("stream", [False, True])
def test_what_waited_too_long_is_told_to_come_back(
    http: httpx.Client, server: Running, path: str, more: dict[str, object], stream: bool
) -> None:
    server.engine.fail_after, server.engine.failure = 0, QueueTimeout("the request waited 600.0 s")
    before = rejections(http)
    answer = ask(http, path, more, stream=stream)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "queue_timeout"
    assert rejections(http) == before + 1


def test_inside_a_stream_it_is_an_event_and_counted(http: httpx.Client, server: Running) -> None:
    """One of a request's rows can have begun when another's time is up."""
    server.engine.fail_after, server.engine.failure = 2, QueueTimeout("the request waited 600.0 s")
    before = rejections(http)
    answer = ask(http, *TEXT, stream=True)
    assert answer.status_code == 200
    assert '"code":"queue_timeout"' in answer.text.replace(" ", "")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert rejections(http) == before + 1


def test_a_tasks_call_ends_as_a_whole(http: httpx.Client, server: Running) -> None:
    task = {"name": "soon", "kind": "generate", "model": NAME}
    assert http.post("/v1/tasks", json=task).status_code == 201
    server.engine.fail_after, server.engine.failure = 0, QueueTimeout("the request waited 600.0 s")
    answer = http.post("/v1/tasks/soon/infer", json={"inputs": ["a", "b"]})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "queue_timeout"
