"""The tuner dies under its jobs: they go on, and only the one that is to blame fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from server.tuning.worker import MOST_DEATHS
from tests.tuner import STEPS, TOKENS, StandIn
from tests.unit.tuning.bench import Bench

pytestmark = pytest.mark.anyio


async def test_a_job_outlives_the_tuner(bench: Bench) -> None:
    _, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    for round_ in range(MOST_DEATHS + 2):  # each after a new checkpoint
        target = 2 * round_ + 2
        if target > STEPS - 2:
            break
        for _ in range(2):
            tuner.gate.release()
        await bench.until(job, lambda record, at=target: record.progress.checkpoint == at)  # type: ignore[misc]
        await tuner.die()
    for _ in range(STEPS):
        tuner.gate.release()
    record = await bench.until(job, "succeeded")
    assert record.progress.trained_tokens == STEPS * TOKENS


async def test_a_tuner_that_dies_and_dies_fails_its_job(bench: Bench) -> None:
    _, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    for death in range(MOST_DEATHS):
        async with asyncio.timeout(10):
            while len(tuner.started) <= death:
                await asyncio.sleep(0.01)
        await tuner.die("killed for lack of memory")
    record = await bench.until(job, "failed")
    assert record.error is not None
    assert record.error.code == "tuner_crashed"
    assert "lack of memory" in record.error.message


async def training(tuner: StandIn, wanted: Callable[[set[str]], bool]) -> set[str]:
    """Waits until the jobs in the tuner are as wanted."""
    async with asyncio.timeout(20):
        while not wanted(tuner.training):
            await asyncio.sleep(0.01)
    return tuner.training


async def test_of_several_jobs_only_the_one_that_kills_the_tuner_fails(bench: Bench) -> None:
    _, tuner = await bench.begin(gated=True)
    jobs = {await bench.submit(str(n)) for n in range(3)}
    for _ in range(2):
        await training(tuner, lambda now: now == jobs)
        await tuner.die()
    innocent: set[str] = set()
    (first,) = await training(tuner, lambda now: len(now) == 1)
    guilty = next(job for job in jobs if job != first)
    alone = first
    while alone != guilty:  # each has its turn, and gives way with its next checkpoint
        innocent.add(alone)
        tuner.gate.release()
        tuner.gate.release()
        (alone,) = await training(tuner, lambda now: len(now) == 1 and not now <= innocent)
    await tuner.die("killed for lack of memory")
    record = await bench.until(guilty, "failed")
    assert record.error is not None
    assert (record.error.code, record.progress.deaths) == ("tuner_crashed", MOST_DEATHS)
    assert "lack of memory" in record.error.message
    for _ in range(3 * STEPS):
        tuner.gate.release()
    for job in jobs - {guilty}:
        record = await bench.until(job, "succeeded")
        assert record.progress.trained_tokens == STEPS * TOKENS
        assert any("trains alone" in text for text in await bench.texts(job))


async def test_a_death_after_a_new_checkpoint_does_not_count(bench: Bench) -> None:
    _, tuner = await bench.begin(gated=True)
    job = await bench.submit()
    await training(tuner, lambda now: now == {job})
    await tuner.die()
    await bench.until(job, lambda record: record.progress.deaths == 1)
    for _ in range(2):
        tuner.gate.release()
    await bench.until(job, lambda record: record.progress.checkpoint == 2)
    await tuner.die()
    await training(tuner, lambda now: now == {job})
    assert (await bench.jobs.get("default", job)).progress.deaths == 0


async def test_who_waits_for_a_suspect_can_be_paused_and_cancelled(bench: Bench) -> None:
    service, tuner = await bench.begin(gated=True)
    jobs = [await bench.submit(str(n)) for n in range(3)]
    for _ in range(2):
        await training(tuner, lambda now: now == {*jobs})
        await tuner.die()
    (alone,) = await training(tuner, lambda now: len(now) == 1)
    paused, cancelled = (job for job in jobs if job != alone)
    await bench.jobs.ask("default", paused, "pause")
    await bench.jobs.ask("default", cancelled, "cancel")
    service.nudge()
    await bench.until(paused, "paused")
    async with asyncio.timeout(20):
        while {*service._held} != {alone}:
            await asyncio.sleep(0.01)
    for _ in range(STEPS):
        tuner.gate.release()
    await bench.until(alone, "succeeded")
    await bench.jobs.ask("default", paused, "resume")
    for _ in range(STEPS):
        tuner.gate.release()
    await bench.until(paused, "succeeded")
