"""Embeddings, OpenAI's way, classification and scores of pairs of texts, vLLM's way, by an encoder."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api import encoding, kinds, models, pairs
from server.api.auth import Caller, Served, authenticate
from server.api.body import read_json
from server.api.connection import while_connected
from server.api.schemas import ClassifyRequest, EmbeddingRequest
from server.api.schemas_tasks import ScoreRequest
from server.api.services import Services
from server.errors import InvalidRequest
from server.types import EncoderInput, Turn, Vector, Want

router = APIRouter(dependencies=[Depends(authenticate)])


@router.post("/v1/embeddings")
async def embeddings(request: Request, services: Served, caller: Caller) -> JSONResponse:
    """One vector for each input, pooled as the backbone's sentence-transformers files say."""
    request.state.kind = "embedding"
    body = await read_json(request, EmbeddingRequest)
    backbone = services.accept_work()
    kinds.encodes(backbone)
    target = await models.resolve(services, backbone, caller, body.model)
    if body.dimensions is not None:
        raise InvalidRequest("This model does not support specifying dimensions.", param="dimensions")
    rows = await encoding.ids_of(body, backbone)
    turn = await services.turn(caller, body.priority)
    found = await _vectors(request, services, turn, rows, target, Want("embedding"))
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": encoding.embedding(vector, body.encoding_format),
        }
        for index, vector in enumerate(found)
    ]
    usage = _usage(rows)
    return JSONResponse(
        {"object": "list", "data": data, "model": body.model, "usage": usage}, headers=target.headers
    )


@router.post("/classify")
async def classify(request: Request, services: Served, caller: Caller) -> JSONResponse:
    """The labels' probabilities for each input, by the delta's task head."""
    request.state.kind = "classify"
    body = await read_json(request, ClassifyRequest)
    backbone = services.accept_work()
    kinds.encodes(backbone)
    target = await models.resolve(services, backbone, caller, body.model)
    kind, labels = kinds.head_of(target)
    rows = await encoding.ids_of(body, backbone)
    turn = await services.turn(caller, body.priority)
    found = await _vectors(request, services, turn, rows, target, Want("head"))
    answer = {
        "id": f"classify-{request.state.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": [*encoding.classes(found, kind, labels, activate=body.use_activation is not False)],
        "usage": _usage(rows) | {"completion_tokens": 0},
    }
    return JSONResponse(answer, headers=target.headers)


@router.post("/score")
async def score(request: Request, services: Served, caller: Caller) -> JSONResponse:
    """vLLM's: how well texts go together, by a head of one output over the pair, else by their embeddings' cosine."""
    request.state.kind = "score"
    body = await read_json(request, ScoreRequest)
    backbone = services.accept_work()
    kinds.encodes(backbone)
    target = await models.resolve(services, backbone, caller, body.model)
    turn = await services.turn(caller, body.priority)
    work = pairs.scores(body, services, backbone, turn, target)
    found, tokens = await while_connected(request, services.state, work)
    answer = {
        "id": f"score-{request.state.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(found)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }
    return JSONResponse(answer, headers=target.headers)


async def _vectors(
    request: Request,
    services: Services,
    turn: Turn,
    rows: list[list[int]],
    target: models.Target,
    want: Want,
) -> list[Vector]:
    inputs = [EncoderInput(row) for row in rows]
    work = encoding.vectors(services.engine, services.metrics, turn, inputs, target.delta, want)
    return await while_connected(request, services.state, work)


def _usage(rows: list[list[int]]) -> dict[str, Any]:
    tokens = sum(len(row) for row in rows)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
