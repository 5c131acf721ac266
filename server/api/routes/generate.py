"""Chat and text completions."""

from __future__ import annotations

import time
from typing import Any, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.api import chat, completions, kinds, models
from server.api.auth import Caller, Served, authenticate
from server.api.body import read_json
from server.api.connection import EventStream, while_connected
from server.api.generation import Generation
from server.api.models import Target
from server.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from server.api.services import Backbone, Services
from server.types import Turn

router = APIRouter(prefix="/v1", dependencies=[Depends(authenticate)])


class Answer(Protocol):
    """A request's answer, in one object or as events."""

    async def whole(self) -> dict[str, Any]: ...

    def events(self) -> Any: ...


@router.post("/chat/completions")
async def chat_completions(request: Request, services: Served, caller: Caller) -> Response:
    """OpenAI's chat completion, by the backbone's chat template."""
    started = time.perf_counter()
    request.state.kind = "chat"
    body = await read_json(request, ChatRequest)
    backbone = services.accept_work()
    kinds.generates(backbone.spec, backbone.info.name)
    target = await models.resolve(services, backbone, caller, body.model)
    kinds.without_head(target)
    rows = await chat.rows_for(body, backbone)
    turn = await services.turn(caller, body.priority)
    generation = _generation(services, backbone, turn, target, started)
    answer = chat.ChatAnswer(body, rows, generation, _head(request, backbone, body, "chatcmpl"))
    return await _respond(request, services, body, target, answer)


@router.post("/completions")
async def text_completions(request: Request, services: Served, caller: Caller) -> Response:
    """OpenAI's text completion."""
    started = time.perf_counter()
    request.state.kind = "completion"
    body = await read_json(request, CompletionRequest)
    backbone = services.accept_work()
    kinds.generates(backbone.spec, backbone.info.name)
    target = await models.resolve(services, backbone, caller, body.model)
    kinds.without_head(target)
    rows = await completions.rows_for(body, backbone)
    turn = await services.turn(caller, body.priority)
    generation = _generation(services, backbone, turn, target, started)
    answer = completions.CompletionAnswer(body, rows, generation, _head(request, backbone, body, "cmpl"))
    return await _respond(request, services, body, target, answer)


async def _respond(
    request: Request, services: Services, body: GenerationRequest, target: Target, answer: Answer
) -> Response:
    if body.stream:
        return EventStream(answer.events(), services.state, target.headers)
    whole = await while_connected(request, services.state, answer.whole())
    return JSONResponse(whole, headers=target.headers)


def _generation(
    services: Services, backbone: Backbone, turn: Turn, target: Target, started: float
) -> Generation:
    return Generation(services.engine, backbone.tokenizer, services.metrics, turn, target.delta, started)


def _head(request: Request, backbone: Backbone, body: GenerationRequest, prefix: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{request.state.request_id}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": f"fp_{backbone.info.revision[:12]}",
    }
