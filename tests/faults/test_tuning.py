"""Whatever is killed while a job runs, the job ends with the same weights as one that nothing happened to."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.command import Server, eventually, serving

pytestmark = [pytest.mark.xdist_group("faults")]

ROWS, EPOCHS, BATCH = 48, 4, 4
STEPS = ROWS // BATCH * EPOCHS
ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def tuning_flags(flags: list[str]) -> list[str]:
    return [*flags, "--tuning-threads", "1"]


@pytest.fixture(scope="module")
def data() -> bytes:
    rng = random.Random(3)
    words = ["red", "green", "blue", "one", "two", "three"]
    rows = [
        {"prompt": " ".join(rng.choices(words, k=5)), "completion": " " + rng.choice(words)}
        for _ in range(ROWS)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def submit(http: httpx.Client, data: bytes, name: str, **delta: Any) -> str:
    """A LoRA job whose steps and checkpoints are many; its id."""
    sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", data)})
    assert sent.status_code in (200, 201), sent.text
    body = {
        "model": "tiny",
        "training_file": sent.json()["id"],
        "seed": 7,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": BATCH}},
        },
        "delta": {
            "name": name,
            "task": "generate",
            "methods": [{"method": "lora", "rank": 4}],
            "checkpoint_every": 3,
            **delta,
        },
    }
    made = http.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code in (200, 201), made.text
    return str(made.json()["id"])


def job(http: httpx.Client, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json()
    return found


def wait_step(http: httpx.Client, job_id: str) -> None:
    """Until it has a checkpoint."""

    def look() -> bool:
        return bool(http.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").raise_for_status().json()["data"])

    eventually(look, within=120, what="a checkpoint")


def digest(http: httpx.Client, job_id: str, name: str) -> str:
    """Of the delta that the job published, once it has."""

    def look() -> dict[str, Any] | None:
        try:
            found = job(http, job_id)
        except httpx.TransportError:
            return None
        return found if found["status"] in ENDED else None

    ended = eventually(look, within=180, what="the job's end")
    assert ended["status"] == "succeeded", ended
    assert ended["fine_tuned_model"] == name
    return str(http.get(f"/v1/deltas/{name}").raise_for_status().json()["digest"])


@pytest.fixture(scope="module")
def undisturbed(
    tuning_flags: list[str], data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, str]]:
    """A server that lives, and the digest of what the job gives when nothing happens."""
    with serving(tmp_path_factory.mktemp("calm") / "data", *tuning_flags) as server:
        server.wait_ready()
        with server.http() as http:
            yield server, digest(http, submit(http, data, "calm"), "calm")


def kill_tuner(server: Server) -> None:
    eventually(lambda: server.child("server.tuning.process"), within=30, what="a tuner").kill()


@pytest.mark.parametrize(
    "kill",
    [kill_tuner, lambda server: server.engine.kill(), lambda server: server.valkey.kill()],
    ids=["tuner", "engine", "valkey"],
)
def test_a_job_outlives_its_server_s_children(
    undisturbed: tuple[Server, str],
    data: bytes,
    kill: Callable[[Server], None],
    request: pytest.FixtureRequest,
) -> None:
    server, expected = undisturbed
    name = f"after-{request.node.callspec.id}"
    with server.http() as http:
        job_id = submit(http, data, name)
        wait_step(http, job_id)
        kill(server)
        assert digest(http, job_id, name) == expected


def test_inference_does_not_notice_the_tuner_s_death(undisturbed: tuple[Server, str], data: bytes) -> None:
    server, _ = undisturbed
    body = {"model": "tiny", "prompt": "red green", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with server.http() as http:
        before = http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
        engine = server.engine
        job_id = submit(http, data, "beside")
        wait_step(http, job_id)
        kill_tuner(server)
        for _ in range(10):
            answer = http.post("/v1/completions", json=body).raise_for_status().json()
            assert answer["choices"][0]["text"] == before
        assert engine.alive
        http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()


def test_a_job_outlives_its_server(
    undisturbed: tuple[Server, str], tuning_flags: list[str], data: bytes, tmp_path: Path
) -> None:
    _, expected = undisturbed
    folder = tmp_path / "data"
    with serving(folder, *tuning_flags) as server:
        server.wait_ready()
        with server.http() as http:
            job_id = submit(http, data, "again")
            wait_step(http, job_id)
        server.kill()
    with serving(folder, *tuning_flags) as server:
        server.wait_ready()
        with server.http() as http:
            assert digest(http, job_id, "again") == expected
            answer = http.post("/v1/completions", json={"model": "again", "prompt": "red", "max_tokens": 2})
            assert answer.status_code == 200, answer.text


def test_a_server_that_is_asked_to_end_leaves_its_jobs_for_the_next(
    undisturbed: tuple[Server, str], tuning_flags: list[str], data: bytes, tmp_path: Path
) -> None:
    _, expected = undisturbed
    folder = tmp_path / "data"
    with serving(folder, *tuning_flags) as server:
        server.wait_ready()
        with server.http() as http:
            job_id = submit(http, data, "later")
            wait_step(http, job_id)
        assert server.terminate() == 0
    with serving(folder, *tuning_flags) as server:
        server.wait_ready()
        with server.http() as http:
            assert digest(http, job_id, "later") == expected
