"""Prometheus' scrape."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from server.api.auth import Served, authenticate_metrics
from server.api.services import Services
from server.metrics import CONTENT_TYPE

router = APIRouter(dependencies=[Depends(authenticate_metrics)])


@router.get("/metrics")
async def metrics(services: Served) -> Response:
    """All series in the text format."""
    services.metrics.stored(*await _stored(services))
    services.metrics.engine_up(services.engine.not_ready is None)
    return Response(services.metrics.render(), headers={"content-type": CONTENT_TYPE})


async def _stored(services: Services) -> tuple[int, int]:
    """How many deltas the blob store holds, and their bytes; without Redis, so that a scrape never needs it."""
    paths = [services.blobs.path(digest) for digest in await services.blobs.digests()]
    return len(paths), await asyncio.to_thread(_bytes, paths)


def _bytes(paths: list[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):  # deleted meanwhile
            total += path.stat().st_size
    return total
