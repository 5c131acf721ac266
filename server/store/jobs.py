"""Tuning jobs: their states, queue, leases, events and checkpoints. Each change is one Lua script.

    validating_files -> queued -> running -> succeeded | failed
                          ^ |        | ^
                          | v        v |
                         paused <-----  (and queued <- running, when its worker leaves)

Every state that is not an end can become ``cancelled``; ``validating_files`` can become ``failed``. Whoever works on a
job holds a lease with a fencing token; when the lease runs out, another may claim the job, and every write with the old
token is refused (:class:`~server.store.job_records.StaleLease`).

The queue is fair between tenants: they take turns, each with its oldest job.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, LimitExceeded, NotFound
from server.store.connect import as_text, load_script
from server.store.job_records import (
    STATES,
    Checkpoint,
    Claimed,
    Event,
    JobError,
    JobFields,
    JobRecord,
    Lease,
    Progress,
    StaleLease,
)
from server.store.keys import Keys
from server.store.reference import shown
from server.store.registry import check_limit
from server.types import DEFAULT_TENANT, JobState, Page

LEASE_SECONDS = 15.0
KEPT_CHECKPOINTS = 32
_ID = re.compile(r"ftjob-[0-9a-f]{24}")
_COMMON = "job_common"
_DID = {"cancel": "cancelled", "pause": "paused", "resume": "resumed"}


class JobStore:
    """All tenants' tuning jobs. A tenant reaches its own only. Methods raise Unavailable while Redis cannot be reached.

    ``clock`` gives Unix seconds; what shares a Redis should share the time.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        lease_seconds: float = LEASE_SECONDS,
        kept_checkpoints: int = KEPT_CHECKPOINTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lease_seconds = lease_seconds
        self._redis = redis
        self._keys = keys
        self._kept = kept_checkpoints
        self._clock = clock
        self._create = load_script(redis, _COMMON, "job_create")
        self._write = load_script(redis, _COMMON, "job_write")
        self._checkpoint = load_script(redis, _COMMON, "job_checkpoint")
        self._claim = load_script(redis, _COMMON, "job_claim")
        self._ask = load_script(redis, _COMMON, "job_ask")
        self._delete = load_script(redis, _COMMON, "job_delete")
        self._adopt = load_script(redis, "job_adopt")
        self._page = load_script(redis, "jobs_page")

    # for tenants

    async def create(
        self,
        tenant: str,
        fields: JobFields,
        owner: str,
        limit: int | None = None,
        *,
        job_id: str | None = None,
    ) -> Lease:
        """A new job, in ``validating_files``, and the right to write to it.

        Raises NotFound (no such tenant), LimitExceeded (as many jobs as ``limit`` have not ended).
        """
        job_id = new_id() if job_id is None else job_id
        made = await self._create(
            keys=[
                *self._keys.of_job(tenant, job_id),
                self._keys.tenants,
                self._keys.counts,
                self._keys.jobs(tenant),
            ],
            args=[
                job_id,
                tenant,
                int(tenant != DEFAULT_TENANT),
                msgspec.json.encode(fields),
                "" if limit is None else limit,
                self._clock() + self.lease_seconds,
                owner,
                self._event(f"Created fine-tuning job: {job_id}"),
            ],
        )
        if made is None:
            raise NotFound(f"tenant {shown(tenant)} does not exist", param="tenant")
        if not made:
            raise LimitExceeded(
                f"the tenant may have {limit} tuning jobs that have not ended: cancel one or wait for one to end",
                code="job_limit_exceeded",
                retry_after=60,
            )
        return Lease(job_id, tenant, 1)

    async def get(self, tenant: str, job_id: str) -> JobRecord:
        """The tenant's own job. Raises NotFound."""
        raw = await self._redis.hgetall(self._keys.job(job_id)) if _ID.fullmatch(job_id) else {}
        if not raw or as_text(raw[b"tenant"]) != tenant:
            raise no_job(job_id)
        return _record(job_id, raw)

    async def list(self, tenant: str, after: str | None = None, limit: int = 20) -> Page:
        """A page of the tenant's own jobs, newest first. ``after`` is the last id of the page before.

        Raises InvalidRequest when ``after`` is gone or ``limit`` is out of range.
        """
        check_limit(limit)
        rows = None
        if after is None or _ID.fullmatch(after):
            keys = [self._keys.jobs(tenant)]
            rows = await self._page(keys=keys, args=[after or "", limit, self._keys.job("")])
        if rows is None:
            raise InvalidRequest(f"there is no job {shown(after or '')} to go on after", param="after")
        items = [_record(as_text(row[0]), dict(zip(row[1::2], row[2::2], strict=True))) for row in rows[1:]]
        return Page(items=items, has_more=bool(rows[0]))

    async def ask(self, tenant: str, job_id: str, what: Literal["cancel", "pause", "resume"]) -> JobRecord:
        """Cancel a job at once, pause it (a running one after its next checkpoint), or let it go on; its record then.

        Raises NotFound, Conflict when its state does not allow it.
        """
        word = "pausing" if what == "pause" else _DID[what]
        done = None
        if _ID.fullmatch(job_id):
            done = await self._ask(
                keys=self._keys.of_job(tenant, job_id),
                args=[job_id, tenant, what, int(self._clock()), self._event(f"Fine-tuning job {word}")],
            )
        if done is None:
            raise no_job(job_id)
        record = await self.get(tenant, job_id)
        if not done:
            now = "being paused" if record.pausing else record.status
            raise Conflict(f"the job {job_id} is {now} and cannot be {_DID[what]}", code="job_state")
        return record

    async def delete(self, tenant: str, job_id: str) -> None:
        """Forget a job that has ended. Raises NotFound, Conflict."""
        gone = await self._forget(tenant, job_id, "") if _ID.fullmatch(job_id) else None
        if gone is None:
            raise no_job(job_id)
        if not gone:
            raise Conflict(f"the job {job_id} has not ended: cancel it first", code="job_state")

    async def events(self, job_id: str, after: int = 0, limit: int = 100) -> Sequence[Event]:
        """Events with numbers greater than ``after``, oldest first. The oldest of very many are forgotten."""
        rows = await self._redis.xrange(self._keys.job_events(job_id), f"({after}-0", "+", count=limit)
        return [_event(row) for row in rows or ()]

    async def newest_events(self, job_id: str, before: int | None, limit: int) -> Page:
        """A page of events, newest first; those with numbers less than ``before``."""
        last = "+" if before is None else f"({before}-0"
        rows = await self._redis.xrevrange(self._keys.job_events(job_id), last, "-", count=limit + 1) or []
        return Page(items=[_event(row) for row in rows[:limit]], has_more=len(rows) > limit)

    async def checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """All kept checkpoints, newest first."""
        values = await self._redis.hvals(self._keys.job_checkpoints(job_id))
        found = [msgspec.json.decode(value, type=Checkpoint) for value in values]
        return sorted(found, key=lambda one: -one.step)

    async def checkpoint(self, job_id: str, step: int) -> Checkpoint | None:
        """The checkpoint of a step, if it is kept."""
        value = await self._redis.hget(self._keys.job_checkpoints(job_id), str(step))
        return None if value is None else msgspec.json.decode(value, type=Checkpoint)

    async def counts(self) -> dict[JobState, int]:
        """How many jobs of all tenants are in each state."""
        values = await self._redis.hmget(self._keys.job_states, list(STATES))
        return {state: int(value or 0) for state, value in zip(STATES, values, strict=True)}

    async def exists(self, job_id: str) -> bool:
        """Whether any tenant has such a job."""
        return bool(await self._redis.exists(self._keys.job(job_id)))

    # for workers

    async def claim(self, owner: str) -> Claimed | None:
        """Lease the next job: one whose worker's lease has run out, else the next in the queue. None: there is none.

        Of a job in ``validating_files`` nothing is left to be done: whoever validated it is dead.
        """
        keys = self._keys
        now = self._clock()
        found = await self._claim(
            keys=[keys.job_leases, keys.job_ring, keys.job_states],
            args=[now, now + self.lease_seconds, owner, keys.job(""), keys.job_queue("")],
        )
        if found is None:
            return None
        lease = Lease(as_text(found[0]), as_text(found[1]), found[2])
        try:
            record = await self.get(lease.tenant, lease.job)
        except NotFound:
            return None  # deleted since
        return Claimed(lease, record, bool(found[4]))

    async def adopt(self, owner: str) -> int:
        """End the leases of a worker that is known to be dead; how many it had."""
        return int(await self._adopt(keys=[self._keys.job_leases], args=[owner, self._keys.job("")]))

    async def renew(self, lease: Lease) -> bool:
        """Hold the lease for longer; whether the job shall be paused. Raises StaleLease."""
        return (await self._put(lease, until=True))[1]

    async def submit(self, lease: Lease, spec: bytes) -> None:
        """Queue a job whose files are valid. Raises StaleLease."""
        message = "Validated files; the job is queued"
        await self._put(lease, spec=spec, status="queued", events=[self._event(message)])

    async def discard(self, lease: Lease) -> None:
        """Forget a job whose files are not valid. Raises StaleLease."""
        if not await self._forget(lease.tenant, lease.job, str(lease.token)):
            raise StaleLease(lease.job)

    async def note(self, lease: Lease, events: Sequence[Event], progress: Progress | None = None) -> None:
        """Append events and keep how far the job has come. Raises StaleLease."""
        await self._put(lease, progress=progress, events=[msgspec.json.encode(event) for event in events])

    async def keep(
        self, lease: Lease, checkpoint: Checkpoint, progress: Progress, event: Event
    ) -> Sequence[int]:
        """Enter a checkpoint; the steps of those that are kept no longer. Raises StaleLease."""
        gone = await self._checkpoint(
            keys=self._keys.of_job(lease.tenant, lease.job),
            args=[
                lease.job,
                lease.token,
                checkpoint.step,
                msgspec.json.encode(checkpoint),
                self._kept,
                msgspec.json.encode(progress),
                msgspec.json.encode(event),
            ],
        )
        if gone is None:
            raise StaleLease(lease.job)
        return [int(step) for step in gone]

    async def rest(self, lease: Lease, event: Event) -> JobState:
        """Give a job back: paused if that is wished, else queued at its old place; its state. Raises StaleLease."""
        return (await self._put(lease, status="rest", events=[msgspec.json.encode(event)]))[0]

    async def fail(self, lease: Lease, error: JobError, result_files: Sequence[str] = ()) -> None:
        """The end of a job that cannot go on. Raises StaleLease."""
        await self._put(
            lease,
            status="failed",
            error=error,
            results=result_files,
            events=[self._event(f"The job failed: {error.message}", "error", {"code": error.code})],
        )

    def now(self) -> int:
        """Unix seconds."""
        return int(self._clock())

    def _event(self, message: str, level: Any = "info", data: dict[str, Any] | None = None) -> bytes:
        return msgspec.json.encode(
            Event(level=level, message=message, data=data or {}, created_at=self.now())
        )

    async def _put(
        self,
        lease: Lease,
        *,
        until: bool = False,
        progress: Progress | None = None,
        spec: bytes = b"",
        status: str = "",
        error: JobError | None = None,
        results: Sequence[str] = (),
        events: Sequence[bytes] = (),
    ) -> tuple[JobState, bool]:
        """The job's state after it, and whether it shall be paused."""
        reply = await self._write(
            keys=self._keys.of_job(lease.tenant, lease.job),
            args=[
                lease.job,
                lease.tenant,
                lease.token,
                self.now(),
                self._clock() + self.lease_seconds if until else "",
                b"" if progress is None else msgspec.json.encode(progress),
                spec,
                status,
                b"" if error is None else msgspec.json.encode(error),
                msgspec.json.encode(list(results)) if results else b"",
                *events,
            ],
        )
        if reply is None:
            raise StaleLease(lease.job)
        return msgspec.convert(as_text(reply[0]), JobState), as_text(reply[1]) == "pause"

    async def _forget(self, tenant: str, job_id: str, token: str) -> int | None:
        keys = [*self._keys.of_job(tenant, job_id), self._keys.jobs(tenant)]
        gone: int | None = await self._delete(keys=keys, args=[job_id, tenant, token])
        return gone


def new_id() -> str:
    """An id that nobody can guess."""
    return f"ftjob-{secrets.token_hex(12)}"


def no_job(job_id: str) -> NotFound:
    """The error for a job that is not there, or another tenant's."""
    return NotFound(f"the fine-tuning job {shown(job_id)} does not exist", param="fine_tuning_job_id")


def _event(row: Any) -> Event:
    number = int(as_text(row[0]).partition("-")[0])
    return msgspec.structs.replace(msgspec.json.decode(row[1][b"e"], type=Event), number=number)


def _record(job_id: str, raw: dict[Any, Any]) -> JobRecord:
    def decoded(field: bytes, kind: Any, default: Any) -> Any:
        value = raw.get(field)
        return default if value is None else msgspec.json.decode(value, type=kind)

    finished, model = raw.get(b"finished_at"), raw.get(b"model")
    return JobRecord(
        id=job_id,
        tenant=as_text(raw[b"tenant"]),
        status=msgspec.convert(as_text(raw[b"status"]), JobState),
        fields=msgspec.json.decode(raw[b"fixed"], type=JobFields),
        progress=decoded(b"progress", Progress, Progress()),
        spec=raw.get(b"spec"),
        pausing=as_text(raw[b"wish"]) == "pause",
        error=decoded(b"error", JobError, None),
        fine_tuned_model=None if model is None else as_text(model),
        result_files=decoded(b"results", list[str], []),
        finished_at=None if finished is None else int(finished),
    )
