"""Prometheus' scrape."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from server.api.auth import Served, authenticate_metrics
from server.metrics import CONTENT_TYPE

router = APIRouter(dependencies=[Depends(authenticate_metrics)])


@router.get("/metrics")
async def metrics(services: Served) -> Response:
    """All series in the text format."""
    services.metrics.engine_up(services.engine.not_ready is None)
    return Response(services.metrics.render(), headers={"content-type": CONTENT_TYPE})
