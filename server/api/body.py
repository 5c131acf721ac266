"""Request bodies: bounded while they arrive, then parsed strictly."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.errors import from_validation
from server.errors import InvalidRequest, TooLarge

MAX_JSON_BYTES = 16 << 20

Model = TypeVar("Model", bound=BaseModel)


def declared_length(request: Request) -> int | None:
    """``Content-Length``, where the client sent one. Raises ``InvalidRequest`` for nonsense."""
    header = request.headers.get("content-length")
    if header is None:
        return None
    if not header.isascii() or not header.isdigit():
        raise InvalidRequest("Content-Length is not a number.")
    return int(header)


def check_length(request: Request, limit: int) -> None:
    """Raises ``TooLarge`` at once if the client announces more than ``limit`` bytes."""
    if (declared_length(request) or 0) > limit:
        raise TooLarge(f"The request body is larger than the {limit} bytes allowed here.")


async def read_body(request: Request, limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole body. Raises ``TooLarge`` as soon as more than ``limit`` bytes have come."""
    check_length(request, limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"The request body is larger than the {limit} bytes allowed here.")
        chunks.append(chunk)
    return b"".join(chunks)


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as ``model``. Raises ``InvalidRequest`` naming the field, ``TooLarge``."""
    return parse_json(await read_body(request), model)


def parse_json(body: bytes, model: type[Model]) -> Model:
    """Bytes as ``model``. Raises ``InvalidRequest`` naming the field."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("The request body is not valid JSON.", code="invalid_json") from error
    if not isinstance(data, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from error
