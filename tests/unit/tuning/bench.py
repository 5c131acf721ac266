"""The job service on a real store, with a stand-in for the tuner and for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis

from server.metrics import Metrics
from server.store.blobs import FileBlobs
from server.store.deltas import DeltaStore
from server.store.files import FileStore
from server.store.job_records import JobRecord
from server.store.jobs import JobStore
from server.store.keys import Keys
from server.store.registry import Registry
from server.tuning.jobs import JobService, ended, worker_name
from server.tuning.publish import Publisher
from server.tuning.spec import JobSpec
from server.tuning.worker import Tools
from server.types import DeltaRef, ProbeResult
from tests.tuner import StandIn
from tests.unit.store.job_cases import job_fields

LEASE = 0.6


@dataclass
class Probe:
    """A stand-in for the engine: its verdicts in order, then ``changes``."""

    verdicts: list[ProbeResult | Exception] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    async def load(self, delta: DeltaRef) -> ProbeResult:
        verdict = self.verdicts.pop(0) if self.verdicts else ProbeResult("changes")
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def drop(self, digest: str) -> None:
        self.dropped.append(digest)


class Bench:
    """Everything that a server has of tuning; ``begin`` makes a process of it, ``kill`` ends one without a word."""

    def __init__(self, redis: Redis, keys: Keys, folder: Path) -> None:
        self.root = folder / "jobs"
        self.metrics = Metrics()
        self.probe = Probe()
        self.jobs = JobStore(redis, keys, lease_seconds=LEASE)
        self.files = FileStore(redis, keys, folder / "files")
        self.deltas = DeltaStore(Registry(redis, keys), FileBlobs(folder / "blobs"))
        self.publisher = Publisher(self.probe, self.deltas, self.files, self.metrics)
        self.running: list[tuple[JobService, StandIn]] = []

    async def begin(self, most: int = 4, **options: Any) -> tuple[JobService, StandIn]:
        tuner = StandIn(**options)
        tools = Tools(self.jobs, tuner, self.publisher, self.metrics, "tiny", retry_seconds=0.01)
        service = JobService(tools, self.root, worker_name(self.root), most, tick_seconds=0.02)
        await service.start()
        self.running.append((service, tuner))
        return service, tuner

    async def kill(self, service: JobService, tuner: StandIn) -> None:
        self.running.remove((service, tuner))
        tasks = [*service._tasks, *(held.task for held in service._held.values())]
        await ended(tasks)
        await tuner.close()

    async def submit(self, name: str = "mine") -> str:
        lease = await self.jobs.create("default", job_fields(name), "submitter")
        spec = JobSpec(id=lease.job, tenant="default", name=name, task="generate", methods=[])
        folder = self.root / lease.job
        folder.mkdir(parents=True)
        (folder / "train.msgpack").write_bytes(b"")
        await self.jobs.submit(lease, msgspec.json.encode(spec))
        return lease.job

    async def until(self, job: str, wanted: Callable[[JobRecord], bool] | str) -> JobRecord:
        async with asyncio.timeout(20):
            while True:
                record = await self.jobs.get("default", job)
                if record.status == wanted if isinstance(wanted, str) else wanted(record):
                    return record
                assert not record.ended, record
                await asyncio.sleep(0.01)

    async def texts(self, job: str) -> list[str]:
        return [event.message for event in await self.jobs.events(job, 0, 1000)]
