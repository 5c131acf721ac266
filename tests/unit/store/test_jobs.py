from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, LimitExceeded, ModelNotFound, NotFound
from server.store.blobs import FileBlobs
from server.store.deltas import DeltaStore
from server.store.job_records import Claimed, JobError, Lease, Progress, StaleLease
from server.store.jobs import JobStore
from server.store.keys import Keys
from server.store.registry import Registry
from server.store.tenants import TenantStore
from tests.unit.store.job_cases import checkpoint, ending, event, job_fields
from tests.unit.store.records import digest_of, fields

pytestmark = pytest.mark.anyio


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(redis: Redis, keys: Keys, clock: Clock) -> JobStore:
    return JobStore(redis, keys, lease_seconds=10, kept_checkpoints=3, clock=clock)


@pytest.fixture
async def tenants(redis: Redis, keys: Keys) -> TenantStore:
    store = TenantStore(redis, keys, b"s" * 32)
    for name in ("acme", "north"):
        await store.create(name)
    return store


async def queued(jobs: JobStore, tenant: str = "default", name: str = "mine") -> str:
    lease = await jobs.create(tenant, job_fields(name), "w")
    await jobs.submit(lease, b'{"spec":1}')
    return lease.job


async def claimed(jobs: JobStore, owner: str = "w") -> Claimed:
    found = await jobs.claim(owner)
    assert found is not None
    return found


async def test_the_life_of_a_job(jobs: JobStore) -> None:
    lease = await jobs.create("default", job_fields(), "w")
    made = await jobs.get("default", lease.job)
    assert (made.status, made.fields, made.spec, made.ended) == (
        "validating_files",
        job_fields(),
        None,
        False,
    )
    assert await jobs.claim("w") is None
    await jobs.submit(lease, b'{"spec":1}')
    with pytest.raises(StaleLease):
        await jobs.renew(lease)
    got = await claimed(jobs)
    assert (got.record.status, got.record.spec, got.taken_over) == ("running", b'{"spec":1}', False)
    assert not await jobs.renew(got.lease)
    await jobs.note(got.lease, [event("one"), event("two")], Progress(step=2, trained_tokens=7))
    for step in (2, 4, 6, 8):
        gone = await jobs.keep(got.lease, checkpoint(step), Progress(step=step), event(str(step)))
    assert gone == [2]
    assert [one.step for one in await jobs.checkpoints(lease.job)] == [8, 6, 4]
    assert await jobs.checkpoint(lease.job, 6) == checkpoint(6)
    assert await jobs.checkpoint(lease.job, 2) is None
    await jobs.fail(got.lease, JobError("tuner_crashed", "it died", "x"), ["file-1"])
    end = await jobs.get("default", lease.job)
    assert (end.status, end.error, end.result_files, end.finished_at) == (
        "failed",
        JobError("tuner_crashed", "it died", "x"),
        ["file-1"],
        1000,
    )
    events = await jobs.events(lease.job)
    assert [one.number for one in events] == [*range(1, len(events) + 1)]
    assert [one.message for one in events[2:5]] == ["one", "two", "2"]
    assert await jobs.events(lease.job, after=4, limit=1) == events[4:5]
    page = await jobs.newest_events(lease.job, None, 2)
    assert ([one.number for one in page.items], page.has_more) == ([len(events), len(events) - 1], True)
    assert (await jobs.counts())["failed"] == 1
    for what in ("cancel", "pause", "resume"):
        with pytest.raises(Conflict):
            await jobs.ask("default", lease.job, what)  # type: ignore[arg-type]
    await jobs.delete("default", lease.job)
    assert not await jobs.exists(lease.job)
    assert (await jobs.counts())["failed"] == 0


async def test_cancel_ends_at_once(jobs: JobStore) -> None:
    job = await queued(jobs)
    assert (await jobs.ask("default", job, "cancel")).status == "cancelled"
    assert await jobs.claim("w") is None
    job = await queued(jobs)
    got = await claimed(jobs)
    with pytest.raises(Conflict):
        await jobs.delete("default", job)
    await jobs.ask("default", job, "cancel")
    for write in (
        jobs.renew(got.lease),
        jobs.note(got.lease, [event("late")]),
        jobs.keep(got.lease, checkpoint(1), Progress(), event("late")),
        jobs.rest(got.lease, event("late")),
        jobs.fail(got.lease, JobError("a", "b")),
    ):
        with pytest.raises(StaleLease):
            await write
    assert "late" not in [one.message for one in await jobs.events(job)]
    lease = await jobs.create("default", job_fields(), "w")
    await jobs.ask("default", lease.job, "cancel")
    with pytest.raises(StaleLease):
        await jobs.submit(lease, b"{}")


async def test_pause_and_resume(jobs: JobStore) -> None:
    job = await queued(jobs)
    assert (await jobs.ask("default", job, "pause")).status == "paused"
    assert await jobs.claim("w") is None
    assert (await jobs.ask("default", job, "resume")).status == "queued"
    got = await claimed(jobs)
    record = await jobs.ask("default", job, "pause")
    assert (record.status, record.pausing) == ("running", True)
    with pytest.raises(Conflict):
        await jobs.ask("default", job, "pause")
    assert await jobs.renew(got.lease)
    assert await jobs.rest(got.lease, event("paused")) == "paused"
    await jobs.ask("default", job, "resume")
    got = await claimed(jobs)
    # Nobody wants the pause any more by the time the worker has made its checkpoint.
    await jobs.ask("default", job, "pause")
    await jobs.ask("default", job, "resume")
    assert await jobs.rest(got.lease, event("left")) == "queued"


async def test_a_dead_workers_jobs_are_taken_over(jobs: JobStore, clock: Clock) -> None:
    job = await queued(jobs)
    first = await claimed(jobs, "a")
    clock.now += 9
    assert not await jobs.renew(first.lease)
    clock.now += 9
    assert await jobs.claim("b") is None
    clock.now += 1
    second = await claimed(jobs, "b")
    assert (second.lease.job, second.taken_over, second.record.status) == (job, True, "running")
    assert second.lease.token > first.lease.token
    with pytest.raises(StaleLease):
        await jobs.note(first.lease, [event("a ghost")])
    await jobs.note(second.lease, [event("mine")])
    # A worker that is known to be dead need not be waited for.
    assert (await jobs.adopt("a"), await jobs.adopt("b")) == (0, 1)
    assert (await claimed(jobs, "c")).taken_over


async def test_a_dead_validation_is_found(jobs: JobStore, clock: Clock) -> None:
    lease = await jobs.create("default", job_fields(), "a")
    clock.now += 11
    got = await claimed(jobs)
    assert (got.lease.job, got.record.status) == (lease.job, "validating_files")
    await jobs.fail(got.lease, JobError("interrupted", "x"))
    assert (await jobs.get("default", lease.job)).status == "failed"


async def test_tenants_take_turns(jobs: JobStore, tenants: TenantStore) -> None:
    for n in range(3):
        await queued(jobs, "acme", f"a{n}")
    for n in range(2):
        await queued(jobs, "north", f"n{n}")
    await queued(jobs, "default", "d0")
    names = [(await claimed(jobs)).record.fields.name for _ in range(6)]
    assert names == ["a0", "n0", "d0", "a1", "n1", "a2"]
    assert await jobs.claim("w") is None


async def test_a_job_that_is_given_back_keeps_its_place(jobs: JobStore) -> None:
    first = await queued(jobs)
    got = await claimed(jobs)
    await queued(jobs)
    assert await jobs.rest(got.lease, event("left")) == "queued"
    assert (await claimed(jobs)).lease.job == first


async def test_the_limit_counts_what_has_not_ended(jobs: JobStore) -> None:
    first = await jobs.create("default", job_fields(), "w", 2)
    second = await jobs.create("default", job_fields(), "w", 2)
    with pytest.raises(LimitExceeded) as caught:
        await jobs.create("default", job_fields(), "w", 2)
    assert (caught.value.code, caught.value.retry_after) == ("job_limit_exceeded", 60)
    await jobs.discard(first)
    assert not await jobs.exists(first.job)
    await jobs.create("default", job_fields(), "w", 2)
    await jobs.ask("default", second.job, "cancel")
    await jobs.create("default", job_fields(), "w", 2)


async def test_tenants_do_not_see_each_other(
    jobs: JobStore, tenants: TenantStore, redis: Redis, keys: Keys
) -> None:
    job = await queued(jobs, "acme")
    running = await queued(jobs, "acme")
    await claimed(jobs)
    kept = await queued(jobs, "north")
    for call in (
        jobs.get("north", job),
        jobs.ask("north", job, "cancel"),
        jobs.delete("north", job),
        jobs.get("north", "ftjob-x"),
    ):
        with pytest.raises(NotFound):
            await call
    assert [item.id for item in (await jobs.list("north")).items] == [kept]
    with pytest.raises(NotFound):
        await jobs.create("nobody", job_fields(), "w")
    await tenants.delete("acme")
    for gone in (job, running):
        assert [key async for key in redis.scan_iter(f"{keys.prefix}:job:{gone}*")] == []
    assert {state: n for state, n in (await jobs.counts()).items() if n} == {"queued": 1}
    assert (await claimed(jobs)).lease.job == kept
    assert await jobs.claim("w") is None


async def test_pages(jobs: JobStore) -> None:
    made = [await queued(jobs) for _ in range(4)]
    page = await jobs.list("default", limit=3)
    assert ([item.id for item in page.items], page.has_more) == (made[:0:-1], True)
    page = await jobs.list("default", after=made[1], limit=3)
    assert ([item.id for item in page.items], page.has_more) == (made[:1], False)
    for after, limit in (("x", 3), ("ftjob-" + "0" * 24, 3), (None, 0)):
        with pytest.raises(InvalidRequest):
            await jobs.list("default", after=after, limit=limit)


async def test_a_version_and_its_job_are_one(
    jobs: JobStore, redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    """Registered and succeeded, or neither."""
    deltas = DeltaStore(Registry(redis, keys), FileBlobs(tmp_path / "blobs"))
    await deltas.start()
    source = tmp_path / "delta"
    source.write_bytes(b"tensors")

    async def publish(lease: Lease) -> None:
        await deltas.add("default", "mine", fields("x"), source, ending=ending(lease))

    job = await queued(jobs)
    got = await claimed(jobs)
    await jobs.ask("default", job, "cancel")
    with pytest.raises(StaleLease):
        await publish(got.lease)
    with pytest.raises(ModelNotFound):
        await deltas.registry.resolve("default", "mine")
    assert await deltas.blobs.digests() == []
    job = await queued(jobs)
    got = await claimed(jobs)
    await publish(got.lease)
    record = await jobs.get("default", job)
    assert (record.status, record.fine_tuned_model, record.result_files) == ("succeeded", "mine", ["file-1"])
    assert (record.progress.step, record.finished_at) == (9, 1)
    assert (await deltas.registry.resolve("default", "mine")).digest == digest_of("x")
    assert (await jobs.events(job))[-1].message == "done"
    with pytest.raises(StaleLease):
        await publish(got.lease)
    assert await deltas.blobs.digests() == [digest_of("x")]
