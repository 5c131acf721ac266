"""``/v1/tasks``: named inference endpoints."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.api import idempotency, models
from server.api.auth import Caller, Served, authenticate
from server.api.body import parse_json, read_body, read_json
from server.api.connection import while_connected
from server.api.paging import After, Limit, listing
from server.api.schemas_tasks import InferRequest, TaskRequest
from server.api.tasks import describe
from server.api.tasks.bind import bind, parameters_of
from server.api.tasks.ways import Call
from server.errors import DeltaserveError
from server.types import Task

router = APIRouter(prefix="/v1/tasks", dependencies=[Depends(authenticate)])


@router.post("")
async def create_task(request: Request, services: Served, caller: Caller) -> Response:
    """A new task. What this backbone and the model of this moment cannot run is refused."""
    request.state.kind = "task_object"
    raw = await read_body(request)
    body = parse_json(raw, TaskRequest)

    async def make() -> tuple[int, dict[str, Any]]:
        backbone = services.backbone()
        task = Task(
            name=body.name,
            kind=body.kind,
            model=body.model,
            template=body.stored_template(),
            labels=body.labels,
            parameters=body.parameters or {},
            created_at=int(time.time()),
        )
        way = bind(task, backbone, await models.resolve(services, backbone, caller, task.model))
        await way.check(backbone, parameters_of(way, task.parameters))
        kept, new = await services.tasks.create(caller.tenant, task)
        return (201 if new else 200), describe.full(kept, str(request.base_url))

    return await idempotency.once(request, services, caller.tenant, hashlib.sha256(raw).hexdigest(), make)


@router.get("")
async def list_tasks(
    request: Request, services: Served, caller: Caller, after: After = None, limit: Limit = 20
) -> Response:
    """The caller's tasks, oldest first. ``after`` is the last name seen."""
    request.state.kind = "task_object"
    page = await services.tasks.list(caller.tenant, after, limit)
    return listing([describe.brief(task) for task in page.items], page.has_more)


@router.get("/{name}")
async def get_task(name: str, request: Request, services: Served, caller: Caller) -> Response:
    """One task, with the schemas of its inputs and outputs, and a call to copy."""
    request.state.kind = "task_object"
    task = await services.tasks.get(caller.tenant, name)
    return JSONResponse(describe.full(task, str(request.base_url)))


@router.delete("/{name}")
async def delete_task(name: str, request: Request, services: Served, caller: Caller) -> Response:
    """Forget a task; its deltas stay."""
    request.state.kind = "task_object"
    await services.tasks.delete(caller.tenant, name)
    return JSONResponse({"id": name, "object": "task", "deleted": True})


@router.post("/{name}/infer")
async def infer(name: str, request: Request, services: Served, caller: Caller) -> Response:
    """One output for each input, in order; a bad input's is its error."""
    started = time.perf_counter()
    request.state.kind = "task"
    body = await read_json(request, InferRequest)
    backbone = services.accept_work()
    task = await services.tasks.get(caller.tenant, name)
    target = await models.resolve(services, backbone, caller, task.model)
    way = bind(task, backbone, target)
    parameters = parameters_of(way, task.parameters, body.parameters)
    await way.check(backbone, parameters)
    turn = await services.turn(caller, parameters.priority)
    call = Call(services.engine, services.metrics, backbone, turn, target, started)
    outcomes = await while_connected(request, services.state, way.run(call, body.inputs, parameters))
    answer = {
        "task": task.name,
        "model": task.model,
        "outputs": [one.body() if isinstance(one, DeltaserveError) else one for one in outcomes],
        "usage": call.usage(),
    }
    return JSONResponse(answer, headers=target.headers)
