"""Lists: ``{"object": "list", "data", "has_more"}`` with ``after`` and ``limit``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import JSONResponse

After = Annotated[str | None, Query(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=100)]


def listing(data: list[dict[str, Any]], has_more: bool = False) -> JSONResponse:
    """One page of a list."""
    return JSONResponse({"object": "list", "data": data, "has_more": has_more})
