"""``Idempotency-Key``: a repeated POST answers as the first one did, and creates nothing again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response

from server.api.services import Services
from server.errors import Conflict, InvalidRequest
from server.store.idempotency import StoredAnswer

Make = Callable[[], Awaitable[tuple[int, dict[str, Any]]]]

_JSON = {"content-type": "application/json"}


async def once(
    request: Request,
    services: Services,
    tenant: str,
    fingerprint: str,
    make: Make,
    *,
    secret: bool = False,
) -> Response:
    """Answer by ``make`` (status and body), or as it answered before under the same key.

    A ``secret`` answer (it shows a key) is not kept: its repetition is a ``Conflict``. ``fingerprint`` is a
    hash of the body. Raises ``Conflict`` for another body under the same key, ``Unavailable`` while the first
    is at work.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return _response(_answer(*await make()))
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest("An Idempotency-Key is printable ASCII.", param="Idempotency-Key")
    begun = await services.idempotency.begin(tenant, f"POST {request.url.path}", key, fingerprint)
    if isinstance(begun, StoredAnswer):
        return _response(begun)
    try:
        answer = _answer(*await make())
    except BaseException:
        await asyncio.shield(services.idempotency.forget(begun))
        raise
    await services.idempotency.finish(begun, _shown_before() if secret else answer)
    return _response(answer)


def _answer(status: int, body: dict[str, Any]) -> StoredAnswer:
    return StoredAnswer(status=status, headers=_JSON, body=msgspec.json.encode(body))


def _shown_before() -> StoredAnswer:
    error = Conflict("An earlier request made this; its key was shown then and is not kept.")
    body = msgspec.json.encode(error.body())
    return StoredAnswer(status=error.status, headers={**_JSON, **error.headers()}, body=body)


def _response(answer: StoredAnswer) -> Response:
    return Response(answer.body, answer.status, answer.headers)
