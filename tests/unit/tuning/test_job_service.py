"""The job service on a real store, with a stand-in for the tuner and for the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deltas.formats import native
from server.errors import EngineRestarting, ModelNotFound
from server.types import ProbeResult
from tests.tuner import STEPS, TOKENS, write_checkpoint, write_delta
from tests.unit.store.job_cases import job_fields
from tests.unit.tuning.bench import Bench

pytestmark = pytest.mark.anyio


async def test_a_job_becomes_a_delta(bench: Bench) -> None:
    await bench.begin()
    job = await bench.submit()
    record = await bench.until(job, "succeeded")
    assert record.fine_tuned_model == "mine"
    assert (record.progress.step, record.progress.trained_tokens) == (STEPS, STEPS * TOKENS)
    delta = await bench.deltas.registry.resolve("default", "mine")
    assert delta.metadata == {"fine_tuning_job": job}
    assert native.load(bench.deltas.blobs.path(delta.digest)).digest == delta.digest
    (results,) = record.result_files
    text = bench.files.path(await bench.files.get("default", results)).read_text()
    assert text.splitlines()[0] == (
        "step,epoch,train_loss,learning_rate,grad_norm,tokens,seconds,valid_loss,valid_accuracy"
    )
    assert text.splitlines()[2] == "2,1.0,0.5,0.001,0.5,10,0.01,1.0,0.2"
    assert len(text.splitlines()) == 1 + STEPS
    steps = [one.step for one in await bench.jobs.checkpoints(job)]
    assert steps == [6, 4, 2]
    async with asyncio.timeout(10):
        while [path.name for path in (bench.root / job).iterdir()] != ["served"]:
            await asyncio.sleep(0.01)
    metrics = bench.metrics.render().decode()
    assert f"deltaserve_tuning_steps_total {STEPS}.0" in metrics
    assert f"deltaserve_tuning_tokens_total {STEPS * TOKENS}.0" in metrics
    assert 'deltaserve_jobs{state="succeeded"}' in metrics


async def test_at_most_so_many_at_once(bench: Bench) -> None:
    _, tuner = await bench.begin(most=2, gated=True)
    jobs = [await bench.submit(str(n)) for n in range(3)]
    for job in jobs[:2]:
        await bench.until(job, "running")
    assert (await bench.jobs.get("default", jobs[2])).status == "queued"
    for _ in range(3 * STEPS):
        tuner.gate.release()
    for job in jobs:
        await bench.until(job, "succeeded")


async def test_a_failed_job_says_why(bench: Bench) -> None:
    _, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    tuner.failing.add(job)
    tuner.gate.release()
    record = await bench.until(job, "failed")
    assert record.error is not None
    assert (record.error.code, record.error.param) == ("not_finite", "learning_rate")
    assert len(record.result_files) == 1


async def test_cancelling_ends_a_run(bench: Bench) -> None:
    service, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    await bench.until(job, "running")
    await bench.jobs.ask("default", job, "cancel")
    service.nudge()
    async with asyncio.timeout(10):
        while service._held or (bench.root / job / "train.msgpack").exists():
            await asyncio.sleep(0.01)
    assert (job, False) in tuner.stopped
    assert (await bench.jobs.get("default", job)).status == "cancelled"


async def test_a_pause_keeps_what_was_trained(bench: Bench) -> None:
    service, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    for _ in range(3):
        tuner.gate.release()
    await bench.until(job, lambda record: record.progress.step == 3)
    await bench.jobs.ask("default", job, "pause")
    service.nudge()
    record = await bench.until(job, "paused")
    assert record.progress.checkpoint == 3
    await bench.jobs.ask("default", job, "resume")
    for _ in range(STEPS):
        tuner.gate.release()
    await bench.until(job, "succeeded")
    assert any(text.startswith("Training goes on after step 3") for text in await bench.texts(job))
    steps = [
        event.data["step"] for event in await bench.jobs.events(job, 0, 1000) if "train_loss" in event.data
    ]
    assert steps == [*range(1, STEPS + 1)]


async def test_a_killed_server_s_job_goes_on(bench: Bench) -> None:
    service, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    for _ in range(3):
        tuner.gate.release()
    await bench.until(job, lambda record: record.progress.step == 3)
    await bench.kill(service, tuner)
    assert (await bench.jobs.get("default", job)).status == "running"
    await bench.begin()
    record = await bench.until(job, "succeeded")
    assert record.progress.trained_tokens == STEPS * TOKENS
    (results,) = record.result_files
    text = bench.files.path(await bench.files.get("default", results)).read_text()
    assert [line.partition(",")[0] for line in text.splitlines()] == ["step", *map(str, range(1, STEPS + 1))]


async def test_an_orderly_end_gives_jobs_back(bench: Bench) -> None:
    service, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    for _ in range(3):
        tuner.gate.release()
    await bench.until(job, lambda record: record.progress.step == 3)
    await service.stop(10)
    bench.running.clear()
    record = await bench.jobs.get("default", job)
    assert (record.status, record.progress.checkpoint) == ("queued", 3)
    await bench.begin()
    await bench.until(job, "succeeded")


async def test_another_worker_takes_over(bench: Bench, tmp_path: Path) -> None:
    """A server with another data folder and the same Redis, after the lease has run out."""
    service, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    await bench.until(job, "running")
    await bench.kill(service, tuner)
    (bench.root / "worker").unlink()
    await bench.begin()
    await bench.until(job, "succeeded")


async def test_a_refused_delta_fails_its_job(bench: Bench) -> None:
    bench.probe.verdicts = [ProbeResult("not_finite", "first at layers.0.attn.q")]
    await bench.begin()
    job = await bench.submit()
    record = await bench.until(job, "failed")
    assert record.error is not None
    assert record.error.code == "invalid_delta"
    assert "layers.0.attn.q" in record.error.message
    with pytest.raises(ModelNotFound):
        await bench.deltas.registry.resolve("default", "mine")


async def test_publishing_waits_for_the_engine(bench: Bench) -> None:
    bench.probe.verdicts = [EngineRestarting("away"), EngineRestarting("still away")]
    await bench.begin()
    await bench.until(await bench.submit(), "succeeded")


@pytest.mark.parametrize("point", ["accept", "results", "put", "registered"])
async def test_a_crash_while_publishing(bench: Bench, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Between any two steps: afterwards there is a delta and a success, or neither, and in the end both."""
    hit = asyncio.Event()
    owner, name = {
        "accept": (bench.probe, "load"),
        "results": (bench.files, "add"),
        "put": (bench.deltas.blobs, "put"),
        "registered": (bench.deltas.registry, "add"),
    }[point]
    original = getattr(owner, name)

    async def crash(*arguments: Any, **named: Any) -> Any:
        await original(*arguments, **named)
        hit.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(owner, name, crash)
    service, tuner = await bench.begin()
    job = await bench.submit()
    async with asyncio.timeout(20):
        await hit.wait()
    await bench.kill(service, tuner)
    monkeypatch.setattr(owner, name, original)
    for stuck in bench.deltas._running:
        stuck.cancel()
    record = await bench.jobs.get("default", job)
    try:
        await bench.deltas.registry.resolve("default", "mine")
        visible = True
    except ModelNotFound:
        visible = False
    assert visible == (record.status == "succeeded") == (point == "registered")
    _, tuner = await bench.begin()
    await bench.until(job, "succeeded")
    assert len(await bench.deltas.registry.versions("default", "mine")) == 1
    assert len(await bench.deltas.blobs.digests()) == 1
    assert tuner.started == [], "it was trained already"


async def test_a_job_cancelled_while_it_is_published(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = bench.deltas.blobs.put
    job = ""

    async def put(digest: str, source: Path) -> None:
        await original(digest, source)
        await bench.jobs.ask("default", job, "cancel")

    monkeypatch.setattr(bench.deltas.blobs, "put", put)
    _, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    for _ in range(STEPS):
        tuner.gate.release()
    async with asyncio.timeout(20):
        while (
            await bench.jobs.get("default", job)
        ).status != "cancelled" or await bench.deltas.blobs.digests():
            await asyncio.sleep(0.01)
    with pytest.raises(ModelNotFound):
        await bench.deltas.registry.resolve("default", "mine")


async def test_a_job_for_another_backbone(bench: Bench) -> None:
    lease = await bench.jobs.create("default", job_fields(backbone="other"), "w")
    await bench.jobs.submit(lease, b"{}")
    await bench.begin()
    record = await bench.until(lease.job, "failed")
    assert record.error is not None
    assert record.error.code == "other_backbone"


async def test_the_stand_in_writes_native_deltas(tmp_path: Path) -> None:
    write_delta(tmp_path / "a", 1)
    assert native.load(write_checkpoint(tmp_path, 1)).digest == native.load(tmp_path / "a").digest
