"""The job service: claims queued jobs, hands them to the tuner, and holds their leases while it works on them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server import logging
from server.errors import Unavailable
from server.store.durable import create_file, make_folder
from server.store.job_records import StaleLease
from server.store.jobs import JobStore, new_id
from server.tuning import folders
from server.tuning.messages import TunerDied
from server.tuning.worker import Ask, Tools, Worker

log = logging.get("server.tuning")

_TICK_SECONDS = 1.0
_INSIST_SECONDS = 0.5


@dataclass
class _Held:
    worker: Worker
    task: asyncio.Task[None]


class JobService:
    """At most ``most`` jobs at once, each in a folder of its own under ``root``.

    ``owner`` is the name of whoever works in ``root`` (:func:`worker_name`): the process before it is dead, so its jobs
    are taken over at once. Jobs of other workers are taken over when their leases run out.
    """

    def __init__(
        self, tools: Tools, root: Path, owner: str, most: int, *, tick_seconds: float = _TICK_SECONDS
    ) -> None:
        self._tools = tools
        self._jobs: JobStore = tools.jobs
        self._root = root
        self._most = most
        self._tick = tick_seconds
        self._owner = owner
        self._held: dict[str, _Held] = {}
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take over what an earlier process left, and begin."""
        await self._jobs.adopt(self._owner)
        await sweep(self._jobs, self._root)
        self._tasks = [asyncio.create_task(self._tend()), asyncio.create_task(self._listen())]

    async def stop(self, seconds: float) -> None:
        """Claim nothing more; every job makes a checkpoint and is queued again, in ``seconds`` at most."""
        tend, *listen = self._tasks
        await ended([tend])
        held = [*self._held.values()]
        for one in held:
            one.worker.inbox.put_nowait(Ask())
        renewing = asyncio.create_task(self._renew_for_ever())
        if held:
            await asyncio.wait([one.task for one in held], timeout=seconds)
        await ended([renewing, *listen])
        for one in held:
            if not one.task.done():
                await ended([one.task])
                await one.worker.rest()

    def nudge(self) -> None:
        """Something was asked of a job: look at once."""
        self._changed.set()

    async def _tend(self) -> None:
        loop = asyncio.get_running_loop()
        due = 0.0
        while True:
            nudged = self._changed.is_set()
            self._changed.clear()
            try:
                if nudged or loop.time() >= due:
                    await self._renew()
                    due = loop.time() + self._jobs.lease_seconds / 3
                while len(self._held) < self._most and await self._claim():
                    pass
                self._tools.metrics.jobs(await self._jobs.counts())
            except Unavailable as error:
                log.warning("tuning_waits_for_registry", reason=error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick):  # wait_for can swallow a cancellation
                    await self._changed.wait()

    async def _claim(self) -> bool:
        claimed = await self._jobs.claim(self._owner)
        if claimed is None:
            return False
        job = claimed.lease.job
        folder = self._root / job
        await asyncio.to_thread(make_folder, folder)
        worker = Worker(self._tools, claimed, folder)
        self._held[job] = _Held(worker, asyncio.create_task(self._work(worker)))
        log.info("tuning_job_claimed", job=job, tenant=claimed.lease.tenant, taken_over=claimed.taken_over)
        return True

    async def _work(self, worker: Worker) -> None:
        job = worker.lease.job
        try:
            await worker.run()
        except StaleLease:
            log.info("tuning_job_gone", job=job)
        finally:
            self._held.pop(job, None)
            self._changed.set()
        await self.tidy(worker.lease.tenant, job)

    async def tidy(self, tenant: str, job: str) -> None:
        """Remove from a job's folder what is not needed any more. A job that can go on keeps all."""
        folder = self._root / job
        if job in self._held:
            return
        if not await self._jobs.exists(job):
            await asyncio.to_thread(folders.remove, folder)
        elif (await self._jobs.get(tenant, job)).ended:
            await asyncio.to_thread(folders.clear, folder)

    async def _renew(self) -> None:
        for one in [*self._held.values()]:
            try:
                if await self._jobs.renew(one.worker.lease):
                    one.worker.inbox.put_nowait(Ask())
            except StaleLease:
                await self._lost(one)

    async def _lost(self, one: _Held) -> None:
        """A job was cancelled or deleted: the tuner need not go on with it."""
        job = one.worker.lease.job
        if one.task.done():
            return  # it ended between the two
        await ended([one.task])
        await self._tools.tuner.stop(job, keep=False)
        log.info("tuning_job_gone", job=job)
        await self.tidy(one.worker.lease.tenant, job)

    async def _renew_for_ever(self) -> None:
        while True:
            with contextlib.suppress(Unavailable):
                await self._renew()
            await asyncio.sleep(self._jobs.lease_seconds / 3)

    async def _listen(self) -> None:
        async for message in self._tools.tuner.messages():
            jobs = message.jobs if isinstance(message, TunerDied) else [message.job]
            for job in jobs:
                if job in self._held:
                    self._held[job].worker.inbox.put_nowait(message)


async def sweep(jobs: JobStore, root: Path) -> list[str]:
    """Remove the folders of jobs that nobody knows any more; their ids."""
    gone = []
    for folder in await asyncio.to_thread(lambda: sorted(root.glob("ftjob-*"))):
        if not await jobs.exists(folder.name):
            await asyncio.to_thread(folders.remove, folder)
            gone.append(folder.name)
    return gone


def worker_name(root: Path) -> str:
    """The name under which leases are held by whoever works in this folder. Blocking."""
    make_folder(root)
    create_file(root / "worker", new_id().replace("ftjob", "worker").encode())
    return (root / "worker").read_text()


async def ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for their ends; once more where a library kept the cancellation to itself."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_INSIST_SECONDS)
