"""``/v1/fine_tuning/jobs``: from files to deltas."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from server.api import idempotency, tuning
from server.api.auth import Caller, Served, authenticate
from server.api.body import parse_json, read_body
from server.api.connection import EventStream
from server.api.job_objects import checkpoint_object, event_number, event_object, job_object
from server.api.paging import After, Limit, listing
from server.api.schemas_tuning import JobRequest
from server.api.services import Services
from server.errors import InvalidRequest

_POLL_SECONDS = 0.25


def _kind(request: Request) -> None:
    request.state.kind = "tuning"


router = APIRouter(prefix="/v1/fine_tuning/jobs", dependencies=[Depends(authenticate), Depends(_kind)])


@router.post("")
async def create_job(request: Request, services: Served, caller: Caller) -> Response:
    """A new job, its files validated and encoded; or, with ``dry_run``, what it would be."""
    raw = await read_body(request)
    body = parse_json(raw, JobRequest)

    async def make() -> tuple[int, dict[str, Any]]:
        if body.dry_run:
            return 200, await tuning.rehearse(services, caller, body)
        return 200, job_object(await tuning.create(services, caller, body))

    return await idempotency.once(request, services, caller.tenant, hashlib.sha256(raw).hexdigest(), make)


@router.get("")
async def list_jobs(services: Served, caller: Caller, after: After = None, limit: Limit = 20) -> Response:
    """The caller's jobs, newest first. ``after`` is the last id seen."""
    page = await services.jobs.list(caller.tenant, after, limit)
    return listing([job_object(job) for job in page.items], page.has_more)


@router.get("/{job}")
async def get_job(job: str, services: Served, caller: Caller) -> Response:
    """One job."""
    return JSONResponse(job_object(await services.jobs.get(caller.tenant, job)))


@router.delete("/{job}")
async def delete_job(job: str, services: Served, caller: Caller) -> Response:
    """Forget a job that has ended, with its events and checkpoints. The delta that it made stays."""
    await tuning.delete(services, caller.tenant, job)
    return JSONResponse({"id": job, "object": "fine_tuning.job", "deleted": True})


@router.post("/{job}/cancel")
async def cancel_job(job: str, services: Served, caller: Caller) -> Response:
    """End a job at once."""
    return JSONResponse(job_object(await tuning.ask(services, caller.tenant, job, "cancel")))


@router.post("/{job}/pause")
async def pause_job(job: str, services: Served, caller: Caller) -> Response:
    """Let a job rest; one that runs makes a checkpoint first, and is ``running`` until then."""
    return JSONResponse(job_object(await tuning.ask(services, caller.tenant, job, "pause")))


@router.post("/{job}/resume")
async def resume_job(job: str, services: Served, caller: Caller) -> Response:
    """Let a paused job go on."""
    return JSONResponse(job_object(await tuning.ask(services, caller.tenant, job, "resume")))


@router.get("/{job}/checkpoints")
async def list_checkpoints(
    job: str,
    services: Served,
    caller: Caller,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Response:
    """The checkpoints that are kept, newest first. ``after`` is the last id seen."""
    record = await services.jobs.get(caller.tenant, job)
    shown = [checkpoint_object(record, one) for one in await services.jobs.checkpoints(job)]
    ids = [one["id"] for one in shown]
    if after is not None and after not in ids:
        raise InvalidRequest("there is no such checkpoint to go on after", param="after")
    first = 0 if after is None else ids.index(after) + 1
    return listing(shown[first : first + limit], len(shown) > first + limit)


@router.get("/{job}/events")
async def list_events(
    job: str,
    request: Request,
    services: Served,
    caller: Caller,
    after: After = None,
    limit: Limit = 20,
    stream: bool = False,
) -> Response:
    """The job's events, newest first; as a stream (``Accept: text/event-stream`` or ``stream=true``) oldest first, until
    the job has ended. A stream goes on after ``Last-Event-ID`` or ``after``.
    """
    await services.jobs.get(caller.tenant, job)
    if stream or "text/event-stream" in request.headers.get("accept", ""):
        last = request.headers.get("last-event-id")
        seen = 0
        if last is not None:
            seen = event_number(job, last, "Last-Event-ID")
        elif after is not None:
            seen = event_number(job, after, "after")
        return EventStream(_follow(services, caller.tenant, job, seen), services.state, id_field="id")
    before = None if after is None else event_number(job, after, "after")
    page = await services.jobs.newest_events(job, before, limit)
    return listing([event_object(job, event) for event in page.items], page.has_more)


async def _follow(
    services: Services, tenant: str, job: str, seen: int
) -> AsyncGenerator[dict[str, Any], None]:
    """Every event after number ``seen``, until the job has ended or the server drains."""
    while True:
        ended = (await services.jobs.get(tenant, job)).ended  # read first: the last event is there by then
        events = await services.jobs.events(job, seen)
        for event in events:
            seen = event.number
            yield event_object(job, event)
        if not events and (ended or services.state.draining):
            return
        if not events:
            await asyncio.sleep(_POLL_SECONDS)
