"""Whatever tenants and workers do, in any order, the job store does what a few lines of Python do: on a real Valkey."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from server.errors import Conflict
from server.store.connect import open_redis
from server.store.job_records import ENDED, JobError, Lease, Progress, StaleLease
from server.store.jobs import JobStore
from server.store.keys import Keys
from server.store.registry import Registry
from server.store.tenants import TenantStore
from server.types import JobState
from tests.unit.store.job_cases import checkpoint, ending, event, job_fields
from tests.unit.store.records import fields

TENANTS = ("default", "acme", "north")
OWNERS = ("one", "two")
LEASE, KEPT = 10.0, 3


@dataclass
class Job:
    """What is known of a job. ``until``: its lease's end, None where nobody holds one."""

    tenant: str
    serial: int
    until: float | None
    owner: str
    status: JobState = "validating_files"
    token: int = 1
    pausing: bool = False
    events: int = 1
    step: int = 0
    checkpoints: set[int] = field(default_factory=set)

    def held(self, lease: Lease) -> bool:
        return self.until is not None and self.token == lease.token


class Machine(RuleBasedStateMachine):
    """The store, and ``model``: what should be in it."""

    url = ""
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = self.run(open_redis(self.url))
        self.keys = Keys(prefix=f"test-{uuid4().hex}")
        self.now = 1000.0
        self.jobs = JobStore(
            self.redis, self.keys, lease_seconds=LEASE, kept_checkpoints=KEPT, clock=lambda: self.now
        )
        self.registry = Registry(self.redis, self.keys)
        tenants = TenantStore(self.redis, self.keys, b"s" * 32)
        for name in TENANTS[1:]:
            self.run(tenants.create(name))
        self.model: dict[str, Job] = {}
        self.ring: list[str] = []
        self.gone: set[str] = set()
        self.made = 0

    def run(self, call: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await call

        return self.runner.run(wait())

    def teardown(self) -> None:
        self.run(self.redis.aclose())
        self.runner.close()

    def put(self, lease: Lease, write: Awaitable[Any]) -> tuple[Job | None, Any]:
        """Writes by a lease: the job and the answer, or nothing where the lease is stale, as the store must find too."""
        job = self.model.get(lease.job)
        held = job is not None and job.held(lease)
        try:
            answer = self.run(write)
        except StaleLease:
            assert not held, "a holder was refused"
            return None, None
        assert held, "a stale write was taken"
        return job, answer

    def move(self, job: Job, status: JobState) -> None:
        job.status = status
        if status != "running":
            job.until, job.owner, job.pausing = None, "", False
        if status == "queued" and job.tenant not in self.ring:
            self.ring.append(job.tenant)

    def may(self, lease: Lease, status: JobState) -> bool:
        """Whether a worker would do now what it does of a job in that state; one with a stale lease may."""
        job = self.model.get(lease.job)
        return job is None or not job.held(lease) or job.status == status

    # what tenants do

    @rule(target=leases, tenant=st.sampled_from(TENANTS), owner=st.sampled_from(OWNERS))
    def create(self, tenant: str, owner: str) -> Lease:
        lease: Lease = self.run(self.jobs.create(tenant, job_fields(), owner))
        self.made += 1
        self.model[lease.job] = Job(tenant, self.made, self.now + LEASE, owner)
        return lease

    @rule(target=leases, tenant=st.sampled_from(TENANTS), count=st.integers(2, 4))
    def queue(self, tenant: str, count: int) -> Any:
        made = [self.create(tenant, OWNERS[0]) for _ in range(count)]
        for lease in made:
            self.submit(lease)
        return multiple(*made)

    @rule(lease=leases, what=st.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, lease: Lease, what: Literal["cancel", "pause", "resume"]) -> None:
        if lease.job in self.gone:
            return
        job = self.model[lease.job]
        allowed = {
            "cancel": job.status not in ENDED,
            "pause": job.status == "queued" or (job.status == "running" and not job.pausing),
            "resume": job.status == "paused" or job.pausing,
        }[what]
        try:
            self.run(self.jobs.ask(job.tenant, lease.job, what))
        except Conflict:
            assert not allowed
            return
        assert allowed
        job.events += 1
        if what == "cancel":
            job.token += 1
            self.move(job, "cancelled")
        elif job.status == "running":
            job.pausing = what == "pause"
        else:
            self.move(job, "paused" if what == "pause" else "queued")

    @rule(lease=leases)
    def delete(self, lease: Lease) -> None:
        if lease.job in self.gone:
            return
        job = self.model[lease.job]
        try:
            self.run(self.jobs.delete(job.tenant, lease.job))
        except Conflict:
            assert job.status not in ENDED
            return
        assert job.status in ENDED
        self.forget(lease.job)

    def forget(self, job: str) -> None:
        del self.model[job]
        self.gone.add(job)

    # what workers do

    @rule(target=leases, owner=st.sampled_from(OWNERS))
    def claim(self, owner: str) -> Any:
        expected, taken = self.next_job()
        found = self.run(self.jobs.claim(owner))
        if expected is None:
            assert found is None
            return multiple()
        job = self.model[expected]
        job.owner, job.until, job.token = owner, self.now + LEASE, job.token + 1
        assert found is not None
        assert (found.lease, found.taken_over) == (Lease(expected, job.tenant, job.token), taken)
        return found.lease

    def next_job(self) -> tuple[str | None, bool]:
        """Which job is claimed: one whose lease has run out, else the next in the queue, which begins to run."""
        expired = [(job.until, name) for name, job in self.model.items() if job.until is not None]
        for until, name in sorted(expired):
            if until <= self.now:
                return name, True
        for _ in range(len(self.ring)):
            tenant = self.ring.pop(0)
            queue = [n for n, job in self.model.items() if (job.tenant, job.status) == (tenant, "queued")]
            if queue:
                if len(queue) > 1:
                    self.ring.append(tenant)
                first = min(queue, key=lambda name: self.model[name].serial)
                self.move(self.model[first], "running")
                return first, False
        return None, False

    @rule(lease=leases)
    def submit(self, lease: Lease) -> None:
        if self.may(lease, "validating_files"):
            job, _ = self.put(lease, self.jobs.submit(lease, b"{}"))
            if job is not None:
                job.events += 1
                self.move(job, "queued")

    @rule(lease=leases)
    def discard(self, lease: Lease) -> None:
        if self.may(lease, "validating_files"):
            job, _ = self.put(lease, self.jobs.discard(lease))
            if job is not None:
                self.forget(lease.job)

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        job, pausing = self.put(lease, self.jobs.renew(lease))
        if job is not None:
            job.until = self.now + LEASE
            assert pausing == job.pausing

    @rule(lease=leases, step=st.integers(1, 9))
    def note(self, lease: Lease, step: int) -> None:
        job, _ = self.put(lease, self.jobs.note(lease, [event("a"), event("b")], Progress(step=step)))
        if job is not None:
            job.step, job.events = step, job.events + 2

    @rule(lease=leases, step=st.integers(1, 9))
    def keep(self, lease: Lease, step: int) -> None:
        write = self.jobs.keep(lease, checkpoint(step), Progress(step=step), event("kept"))
        job, gone = self.put(lease, write)
        if job is not None:
            job.step, job.events = step, job.events + 1
            every = sorted({*job.checkpoints, step})
            job.checkpoints = {*every[-KEPT:]}
            assert sorted(gone) == every[:-KEPT]

    @rule(lease=leases)
    def rest(self, lease: Lease) -> None:
        if self.may(lease, "running"):
            job, status = self.put(lease, self.jobs.rest(lease, event("left")))
            if job is not None:
                job.events += 1
                self.move(job, "paused" if job.pausing else "queued")
                assert status == job.status

    @rule(lease=leases)
    def fail(self, lease: Lease) -> None:
        job, _ = self.put(lease, self.jobs.fail(lease, JobError("x", "it failed")))
        if job is not None:
            job.events += 1
            self.move(job, "failed")

    @rule(lease=leases)
    def finish(self, lease: Lease) -> None:
        if self.may(lease, "running"):
            add = self.registry.add(lease.tenant, "mine", fields(lease.job), ending=ending(lease))
            job, _ = self.put(lease, add)
            if job is not None:
                job.step, job.events = 9, job.events + 1
                self.move(job, "succeeded")

    # what happens

    @rule(owner=st.sampled_from(OWNERS))
    def a_worker_dies(self, owner: str) -> None:
        its = [job for job in self.model.values() if job.until is not None and job.owner == owner]
        for job in its:
            job.until = 0.0
        assert self.run(self.jobs.adopt(owner)) == len(its)

    @rule(seconds=st.sampled_from([1.0, 9.0, 10.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # what always holds

    @invariant()
    def every_job_is_as_it_should_be(self) -> None:
        for name, job in self.model.items():
            record = self.run(self.jobs.get(job.tenant, name))
            assert (record.status, record.pausing, record.progress.step) == (
                job.status,
                job.pausing,
                job.step,
            )
            assert (record.finished_at is not None) == (job.status in ENDED)
            numbers = [one.number for one in self.run(self.jobs.events(name, 0, 1000))]
            assert numbers == [*range(1, job.events + 1)]
            assert {one.step for one in self.run(self.jobs.checkpoints(name))} == job.checkpoints
        for name in self.gone:
            assert not self.run(self.jobs.exists(name))

    @invariant()
    def indexes_agree(self) -> None:
        states = Counter(job.status for job in self.model.values())
        assert {state: n for state, n in self.run(self.jobs.counts()).items() if n} == states
        held = {name.encode(): job.until for name, job in self.model.items() if job.until is not None}
        assert dict(self.run(self.redis.zrange(self.keys.job_leases, 0, -1, withscores=True))) == held
        for tenant in TENANTS:
            own = {name for name, job in self.model.items() if job.tenant == tenant}
            queued = {name for name in own if self.model[name].status == "queued"}
            active = {name for name in own if self.model[name].status not in ENDED}
            page = self.run(self.jobs.list(tenant, limit=100))
            assert {record.id for record in page.items} == own
            assert {
                *map(bytes.decode, self.run(self.redis.zrange(self.keys.job_queue(tenant), 0, -1)))
            } == queued
            assert {
                *map(bytes.decode, self.run(self.redis.smembers(self.keys.jobs_active(tenant))))
            } == active


def test_the_store_is_the_model(valkey_url: str) -> None:
    class OnValkey(Machine):
        url = valkey_url

    run_state_machine_as_test(
        OnValkey,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )
