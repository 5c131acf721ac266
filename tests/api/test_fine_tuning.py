"""Files and tuning jobs by the stock ``openai`` client; only the engine, the tuner and the encoding are stand-ins."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.fakes import NAME
from tests.api.running import ADMIN, Running, running
from tests.tuner import STEPS, open_stand_in

ROWS = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8)]
DATA = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("data"), open_stand_in) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=ADMIN, max_retries=0) as made:
        yield made


@pytest.fixture
def stranger(server: Running, http: httpx.Client) -> Iterator[openai.OpenAI]:
    answer = http.post("/v1/tenants", json={"name": f"t{time.time_ns()}", "limits": {"jobs": 0}})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=answer.json()["key"], max_retries=0) as made:
        yield made


def uploaded(client: openai.OpenAI) -> str:
    return client.files.create(file=("train.jsonl", DATA), purpose="fine-tune").id


def done(client: openai.OpenAI, job: str) -> Any:
    deadline = time.monotonic() + 30
    while (
        found := client.fine_tuning.jobs.retrieve(job)
    ).finished_at is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_files(client: openai.OpenAI, stranger: openai.OpenAI) -> None:
    made = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == (
        "file",
        len(DATA),
        "train.jsonl",
        "fine-tune",
    )
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == DATA
    assert made.id in [item.id for item in client.files.list(purpose="fine-tune", order="asc")]
    assert client.files.list(purpose="vision").data == []
    for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "purpose"), ({"purpose": "x"}, "purpose"), ({"purpose": "batch", "x": "1"}, "x")],
)
def test_bad_uploads(http: httpx.Client, fields: dict[str, str], param: str) -> None:
    answer = http.post("/v1/files", data=fields, files={"file": ("a", b"x")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_upload_sent_twice_is_one_file(http: httpx.Client) -> None:
    boundary = {"content-type": "multipart/form-data; boundary=b", "idempotency-key": "once"}
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nabc\r\n--b--\r\n'
    )
    first, second = (http.post("/v1/files", content=body, headers=boundary).json() for _ in range(2))
    assert first["id"] == second["id"]


def test_a_job_from_file_to_model(client: openai.OpenAI, http: httpx.Client) -> None:
    training = uploaded(client)
    job = client.fine_tuning.jobs.create(
        model=NAME,
        training_file=training,
        suffix="mine",
        seed=7,
        metadata={"a": "b"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
        extra_body={"delta": {"task": "generate", "methods": [{"method": "lora", "rank": 4}]}},
    )
    assert (job.object, job.seed, job.hyperparameters.n_epochs) == ("fine_tuning.job", 7, 2)
    client.files.delete(training)
    end = done(client, job.id)
    assert (end.status, end.fine_tuned_model, end.error) == ("succeeded", "mine", None)
    assert end.trained_tokens
    text = client.files.content(end.result_files[0]).text
    assert text.startswith("step,epoch,train_loss")
    assert len(text.splitlines()) == STEPS + 1
    answer = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    assert events[-1].message.startswith("Created")
    assert "successfully" in events[0].message
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [point.step_number for point in points] == [6, 4, 2]
    assert points[0].metrics.train_loss
    assert points[0].metrics.full_valid_loss
    name = points[1].fine_tuned_model_checkpoint
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content
    assert name not in [model.id for model in client.models.list()]
    assert job.id in [item.id for item in client.fine_tuning.jobs.list()]
    assert http.delete(f"/v1/fine_tuning/jobs/{job.id}").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])


def streamed(http: httpx.Client, job: str, **headers: str) -> list[tuple[str, dict[str, Any]]]:
    found, event = [], ""
    with http.stream(
        "GET", f"/v1/fine_tuning/jobs/{job}/events", headers={"accept": "text/event-stream", **headers}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("id: "):
                event = line.removeprefix("id: ")
            elif line.startswith("data: {"):
                found.append((event, json.loads(line.removeprefix("data: "))))
    return found


def test_events_as_a_stream_go_on_where_they_were(client: openai.OpenAI, http: httpx.Client) -> None:
    job = client.fine_tuning.jobs.create(
        model=NAME, training_file=uploaded(client), extra_body={"delta": {"name": "followed"}}
    )
    whole = streamed(http, job.id)
    assert "successfully" in whole[-1][1]["message"]
    assert [one[0] for one in whole] == [one[1]["id"] for one in whole]
    assert streamed(http, job.id, **{"last-event-id": whole[3][0]}) == whole[4:]
    bad = http.get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true", headers={"last-event-id": "x"})
    assert bad.status_code == 400


def test_a_dry_run_makes_nothing(client: openai.OpenAI, http: httpx.Client) -> None:
    before = len(list(client.fine_tuning.jobs.list()))
    body = {
        "model": NAME,
        "training_file": uploaded(client),
        "dry_run": True,
        "hyperparameters": {"n_epochs": 2},
    }
    found = http.post("/v1/fine_tuning/jobs", json=body).json()
    assert (found["examples"], found["steps"], found["trained_tokens"]) == (8, 2, 2 * found["tokens"])
    assert len(list(client.fine_tuning.jobs.list())) == before


def test_an_earlier_delta_is_trained_on_by_its_own_methods(client: openai.OpenAI, http: httpx.Client) -> None:
    first = client.fine_tuning.jobs.create(model=NAME, training_file=uploaded(client), suffix="earlier")
    done(client, first.id)
    body = {"model": NAME, "training_file": uploaded(client), "dry_run": True}
    for init, frozen in (("earlier", False), ({"model": "earlier", "frozen": True}, True)):
        found = http.post("/v1/fine_tuning/jobs", json={**body, "delta": {"init_from": init}}).json()
        assert [one["method"] for one in found["delta"]["methods"]] == ["lora"]
        assert found["delta"]["init_from"]["frozen"] is frozen


def test_a_prompt_begins_with_a_text(client: openai.OpenAI, http: httpx.Client) -> None:
    prompt = {"method": "prompt", "length": 8, "init": "text", "init_text": "Classify:"}
    body = {
        "model": NAME,
        "training_file": uploaded(client),
        "dry_run": True,
        "delta": {"methods": [prompt]},
    }
    (method,) = http.post("/v1/fine_tuning/jobs", json=body).json()["delta"]["methods"]
    assert method["options"]["init_tokens"] == [*b"Classify:"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"colour": 1}, "colour"),
        ({"delta": {"colour": 1}}, "delta.colour"),
        ({"delta": {"methods": [{"method": "magic"}]}}, "delta.methods.0.method"),
        ({"delta": {"methods": [{"method": "lora", "rank": 0}]}}, "delta.methods.0.rank"),
        ({"delta": {"methods": [{"method": "lora", "targets": ["nowhere"]}]}}, "delta.methods.0.targets"),
        ({"delta": {"methods": [{"method": "prompt", "init_text": ""}]}}, "delta.methods.0.init_text"),
        ({"delta": {"methods": [{"method": "prompt", "init": "text"}]}}, "delta.methods.0.init"),
        ({"delta": {"methods": [{"method": "lora", "init_text": "a"}]}}, "delta.methods.0.init_text"),
        ({"delta": {"name": "a/b"}}, "delta.name"),
        ({"validation_file": "file-x"}, "validation_file"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"model": "nothing"}, "model"),
        ({"delta": {"early_stopping": {"patience": 2}}}, "delta.early_stopping"),
        ({"delta": {"evaluate_every": 2}}, "delta.evaluate_every"),
        ({"delta": {"task": "generate", "metric": "rouge_l"}}, "delta.metric"),  # without a validation file
        ({"delta": {"task": "generate", "metric": "accuracy"}}, "delta.metric"),
        ({"delta": {"precision": "bfloat16"}}, "delta.precision"),
    ],
)
def test_bad_jobs(client: openai.OpenAI, http: httpx.Client, body: dict[str, Any], param: str) -> None:
    before = len(list(client.fine_tuning.jobs.list()))
    answer = http.post(
        "/v1/fine_tuning/jobs", json={"model": NAME, "training_file": uploaded(client), **body}
    )
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param
    assert len(list(client.fine_tuning.jobs.list())) == before


def test_bad_rows_leave_no_job(client: openai.OpenAI, http: httpx.Client, server: Running) -> None:
    before = len(list(client.fine_tuning.jobs.list()))
    file = client.files.create(file=("bad.jsonl", b'{"text": "a"}\n'), purpose="fine-tune").id
    answer = http.post("/v1/fine_tuning/jobs", json={"model": NAME, "training_file": file})
    assert answer.json()["error"]["param"] == "training_file"
    assert len(list(client.fine_tuning.jobs.list())) == before


def test_tenants_do_not_see_each_other_s_jobs(client: openai.OpenAI, stranger: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.create(model=NAME, training_file=uploaded(client), suffix="hidden").id
    for call in (
        stranger.fine_tuning.jobs.retrieve,
        stranger.fine_tuning.jobs.cancel,
        stranger.fine_tuning.jobs.pause,
        stranger.fine_tuning.jobs.resume,
        stranger.fine_tuning.jobs.list_events,
        stranger.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            call(job)
    assert stranger.fine_tuning.jobs.list().data == []
    with pytest.raises(openai.RateLimitError) as caught:
        stranger.fine_tuning.jobs.create(model=NAME, training_file=uploaded(stranger))
    assert caught.value.code == "job_limit_exceeded"
    done(client, job)
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job)


def test_a_job_without_a_tuner_can_be_paused_and_cancelled(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ADMIN, max_retries=0)
        job = client.fine_tuning.jobs.create(model=NAME, training_file=uploaded(client)).id
        assert client.fine_tuning.jobs.pause(job).status == "paused"
        assert client.fine_tuning.jobs.resume(job).status == "queued"
        assert client.fine_tuning.jobs.cancel(job).status == "cancelled"


def test_tuning_can_be_off(tmp_path: Path) -> None:
    with running(tmp_path, tuning="off") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ADMIN, max_retries=0)
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(model=NAME, training_file=uploaded(client))
        assert caught.value.code == "tuning_off"
