"""vLLM's ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api import models, prompts
from server.api.auth import Caller, Served, authenticate
from server.api.body import read_json
from server.api.schemas import DetokenizeRequest, TokenizeRequest

router = APIRouter(dependencies=[Depends(authenticate)])


@router.post("/tokenize")
async def tokenize(request: Request, services: Served, caller: Caller) -> JSONResponse:
    """A prompt's token ids, or those of messages by the chat template."""
    request.state.kind = "tokenize"
    body = await read_json(request, TokenizeRequest)
    backbone = services.backbone()
    if body.model is not None:
        await models.resolve(services, backbone, caller, body.model)
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        tokens = await prompts.render(backbone.tokenizer, messages, body.add_generation_prompt)
    else:
        tokens = await prompts.encode(backbone.tokenizer, body.prompt or "", body.add_special_tokens)
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": backbone.info.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [backbone.tokenizer.token_text(token) for token in tokens]
    return JSONResponse(answer)


@router.post("/detokenize")
async def detokenize(request: Request, services: Served, caller: Caller) -> JSONResponse:
    """The text of token ids."""
    request.state.kind = "tokenize"
    body = await read_json(request, DetokenizeRequest)
    backbone = services.backbone()
    if body.model is not None:
        await models.resolve(services, backbone, caller, body.model)
    prompts.check_ids(body.tokens, backbone, "tokens")
    return JSONResponse({"prompt": backbone.tokenizer.decode(body.tokens, skip_special_tokens=False)})
