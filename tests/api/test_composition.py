"""Sums of deltas as model names, over HTTP: a real server on a tiny backbone, and the registry's errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from deltas.delta import Component, Delta
from deltas.formats import native
from server.types import DeltaPart, DeltaRef, EngineStats
from tests.api.command import Server, eventually, serving
from tests.api.fakes import NAME
from tests.api.running import Running, lora_files, push
from tests.tiny import native_files, write_backbone

BACKBONE = "tiny"
Native = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def native_file(tmp_path_factory: pytest.TempPathFactory) -> Native:
    folder = tmp_path_factory.mktemp("composition")
    return native_files(write_backbone(folder / BACKBONE), folder / "native")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, native_file: Native) -> Iterator[Server]:
    """A server with the default tenant's ``a`` (two versions), ``b``, two prompts, and ``north``'s public ``c``."""
    folder = tmp_path_factory.mktemp("server")
    backbone = write_backbone(folder / BACKBONE)
    flags = ["--backbone", str(backbone), "--dtype", "float32", "--threads", "1"]
    with serving(folder / "data", *flags) as server:
        with server.http() as http:
            for name, kind, seed in (
                ("a", "bitfit", 1),
                ("a", "bitfit", 2),
                ("b", "bitfit", 3),
                ("one", "prompt", 1),
                ("two", "prompt", 2),
            ):
                assert upload(http, name, native_file(kind, seed)).status_code == 201
            key = http.post("/v1/tenants", json={"name": "north"}).json()["key"]
        with server.http(key) as north:
            assert upload(north, "c", native_file("lora", 4), visibility="public").status_code == 201
            assert upload(north, "secret", native_file("lora", 5)).status_code == 201
        yield server


@pytest.fixture
def client(real: Server) -> Iterator[httpx.Client]:
    with real.http() as http:
        yield http


def upload(http: httpx.Client, name: str, file: Path, **fields: str) -> httpx.Response:
    files = {"file": ("delta.safetensors", file.read_bytes())}
    return http.post("/v1/deltas", data={"name": name, **fields}, files=files)


def complete(http: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "To be:", "max_tokens": 6, "temperature": 0, "logprobs": 0}
    return http.post("/v1/completions", json=body | {"ignore_eos": True} | fields)


def chat(http: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    return http.post("/v1/chat/completions", json=body | fields)


def logprobs(answer: httpx.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    return found


def digest_of(http: httpx.Client, *terms: tuple[str, float]) -> str:
    parts = [
        DeltaPart(complete(http, name, max_tokens=1).headers["x-delta-digest"], "", w) for name, w in terms
    ]
    return DeltaRef.of_sum(parts).digest


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def test_a_sum_serves_what_one_delta_of_that_sum_does(
    client: httpx.Client, native_file: Native, tmp_path: Path
) -> None:
    parts = [native.load(native_file("bitfit", seed)) for seed in (2, 3)]
    (one,), (two,) = (part.components for part in parts)
    betas = {name: 0.7 * one.tensors[name] + 0.3 * two.tensors[name] for name in one.tensors}
    native.save(Delta((Component("bitfit", {}, betas),)), tmp_path / "sum.safetensors")
    assert upload(client, "added", tmp_path / "sum.safetensors").status_code == 201
    expected = complete(client, "added")
    answer = complete(client, "a*0.7+b*0.3")
    assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-4)
    assert answer.json()["choices"][0]["text"] == expected.json()["choices"][0]["text"]
    assert answer.json()["model"] == "a*0.7+b*0.3"
    assert answer.headers["x-delta-digest"] == digest_of(client, ("a", 0.7), ("b", 0.3))
    others = [logprobs(complete(client, model)) for model in ("a", "b", "a+b", "a*0.7", BACKBONE)]
    assert all(other != pytest.approx(logprobs(answer), abs=1e-2) for other in others)


def test_every_way_to_name_the_terms(client: httpx.Client) -> None:
    assert client.put("/v1/deltas/a/aliases/old", json={"version": 1}).status_code == 200
    terms = digest_of(client, ("a@1", 0.5), ("b", 1.0), ("north/c", -0.25))
    answers = [
        complete(client, model)
        for model in (
            "a@1*0.5+b+north/c*-0.25",
            "a@old*0.50+b@live*1.0+north/c@1*-0.250",
            "default/a@1*0.5+default/b*1+north/c@live*-0.25",
        )
    ]
    assert {answer.headers["x-delta-digest"] for answer in answers} == {terms}
    assert len({json.dumps(logprobs(answer)) for answer in answers}) == 1
    for model in ("b+a@1*0.5+north/c*-0.25", "a@2*0.5+b+north/c*-0.25", "a@1*0.5+b+north/c*0.25"):
        assert complete(client, model).headers["x-delta-digest"] != terms
    alone = complete(client, "b")
    for model in ("b*1", "b*1.000"):  # a delta by itself is no sum
        assert complete(client, model).headers["x-delta-digest"] == alone.headers["x-delta-digest"]


def test_every_endpoint_takes_a_sum(client: httpx.Client) -> None:
    model = "a*0.5+b"
    digest = complete(client, model).headers["x-delta-digest"]
    for answer in (
        complete(client, model, stream=True),
        complete(client, model, prompt=["x", "y"], n=2),
        chat(client, model),
        chat(client, model, stream=True),
    ):
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-delta-digest"] == digest
        assert "error" not in answer.text
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        assert client.post(path, json={"model": model, **body}).status_code == 200
        assert client.post(path, json={"model": "a+nobody", **body}).status_code == 404
    shown = client.get(f"/v1/models/{model}").json()
    assert (shown["id"], shown["parent"], shown["owned_by"]) == (model, BACKBONE, "default")
    assert client.get("/v1/models/a+nobody").status_code == 404
    assert model not in [item["id"] for item in client.get("/v1/models").json()["data"]]


@pytest.mark.parametrize(
    ("model", "error", "named"),
    [
        ("a+nobody", (404, "model_not_found", "model"), "'nobody'"),
        ("a*0.5+b@7*0.5", (404, "model_not_found", "model"), "'b@7'"),
        ("nobody*0.5", (404, "model_not_found", "model"), "'nobody'"),
        ("a+north/secret", (404, "model_not_found", "model"), "'north/secret'"),
        ("a*0+b", (400, "invalid_request", "model"), "'a*0'"),
        ("a*1e3+b", (400, "invalid_request", "model"), "'a*1e3'"),
        ("a*101", (400, "invalid_request", "model"), "'a*101'"),
        ("0.5*a+b", (400, "invalid_request", "model"), "'0.5*a'"),
        ("a++b", (400, "invalid_request", "model"), "empty"),
        ("a+" * 8 + "a", (400, "invalid_request", "model"), "at most 8"),
        (f"a+{BACKBONE}*0.5", (400, "invalid_request", "model"), f"'{BACKBONE}'"),
        ("one+two", (400, "invalid_composition", "model"), "positions"),
        ("a+one*0.5", (400, "invalid_composition", "model"), "no exact multiple"),
    ],
)
def test_refusals(client: httpx.Client, model: str, error: tuple[int, str, str | None], named: str) -> None:
    for answer in (
        complete(client, model),
        complete(client, model, stream=True),
        complete(client, model, prompt=["x", "y"]),
        chat(client, model),
        chat(client, model, stream=True),
    ):
        assert refusal(answer) == error, answer.text
        assert named in answer.json()["error"]["message"]
        assert "x-delta-digest" not in answer.headers


def test_the_end_of_a_part_is_the_end_of_its_sums(
    real: Server, client: httpx.Client, native_file: Native
) -> None:
    def resident() -> set[str]:
        text = client.get("/metrics").text.splitlines()
        return {line for line in text if line.startswith("deltaserve_deltas_resident") and "disk" not in line}

    assert upload(client, "brief", native_file("lora", 9)).status_code == 201
    assert complete(client, "b").status_code == 200
    time.sleep(0.5)  # the engine's reports come four times a second
    before = resident()
    first = complete(client, "brief*0.5+b")
    assert complete(client, "brief*0.25+b").status_code == 200
    eventually(lambda: resident() != before, within=5, what="two more deltas in memory")
    assert client.delete("/v1/deltas/brief").status_code == 200
    assert refusal(complete(client, "brief*0.5+b")) == (404, "model_not_found", "model")
    assert complete(client, "b").status_code == 200

    def fewer() -> bool:
        complete(client, BACKBONE, max_tokens=1)  # an idle engine reports nothing
        counts = zip(sorted(resident()), sorted(before), strict=True)
        return all(float(now.split()[-1]) == float(then.split()[-1]) - 1 for now, then in counts)

    eventually(fewer, within=10, what="neither the part nor its sums in memory")
    assert upload(client, "brief", native_file("lora", 9)).status_code == 201
    again = complete(client, "brief*0.5+b")
    assert again.headers["x-delta-digest"] == first.headers["x-delta-digest"]
    assert logprobs(again) == logprobs(first)


def test_a_sum_without_numbers_ends_alone(client: httpx.Client, tmp_path: Path) -> None:
    site = "layers.1.mlp.down"
    tensors = {f"{site}/A": torch.full((2, 96), 1e18), f"{site}/B": torch.full((64, 2), 1e18)}
    native.save(Delta((Component("lora", {"scale": 1.0}, tensors),)), tmp_path / "large.safetensors")
    assert upload(client, "large", tmp_path / "large.safetensors").status_code == 201
    model = "large*100+b"
    assert refusal(complete(client, model)) == (500, "row_failed", None)
    for answer in (complete(client, model), chat(client, model, stream=True)):
        assert refusal(answer) == (409, "delta_quarantined", "model")
        assert answer.headers["x-should-retry"] == "false"
    for name in ("large", "b", "large+b"):
        assert complete(client, name).status_code == 200
    for name in ("large", "b"):
        assert client.get(f"/v1/deltas/{name}").json()["status"] == "ready"


def test_a_quarantined_part(http: httpx.Client, server: Running, tmp_path: Path) -> None:
    assert push(http, lora_files(tmp_path / "good", seed=21), name="good").status_code == 201
    bad = push(http, lora_files(tmp_path / "bad", seed=22), name="bad").json()
    assert complete(http, "good*0.5+bad*0.5").status_code == 200
    call = server.engine.calls[-1]
    assert call.delta is not None
    assert [(part.digest == bad["digest"], part.weight) for part in call.delta.parts] == [
        (False, 0.5),
        (True, 0.5),
    ]
    assert all(Path(part.path).is_file() for part in call.delta.parts)
    take = server.engine.on_stats
    assert take is not None
    server.call(lambda: take(EngineStats(quarantined={bad["digest"]: "why not"})))
    eventually(lambda: complete(http, "good*0.5+bad*0.5").status_code == 409, within=5, what="the quarantine")
    answer = complete(http, "good*0.5+bad*0.5")
    assert refusal(answer) == (409, "delta_quarantined", "model")
    assert "'bad'" in answer.json()["error"]["message"]
    assert complete(http, "good*0.5").status_code == 200
    assert refusal(complete(http, f"good+{NAME}")) == (400, "invalid_request", "model")
