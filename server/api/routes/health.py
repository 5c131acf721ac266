"""Liveness and readiness: the only routes that need no key."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.api.auth import Served

router = APIRouter(prefix="/health")


@router.get("/live")
async def live() -> JSONResponse:
    """200 while the process lives."""
    return JSONResponse({"status": "live"})


@router.get("/ready")
async def ready(services: Served) -> JSONResponse:
    """200 once the backbone is resident and until the server drains, else 503 with the reason."""
    reason = services.not_ready()
    if reason is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not_ready", "reason": reason}, 503, headers={"retry-after": "2"})
