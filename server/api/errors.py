"""Every error leaves as ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deltas.errors import DeltaError
from server.errors import (
    DeltaRefused,
    DeltaserveError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
)


def error_response(error: DeltaserveError) -> JSONResponse:
    """The answer to a request that failed."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def install(app: FastAPI) -> None:
    """Map our errors, the framework's and its 404/405 to the one form."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, DeltaserveError):
            raise error
        return _note(request, error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            raise error
        return _note(request, first_problem(list(error.errors()), skip=("body", "query", "path", "header")))

    async def http(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        return _note(request, _from_http(request, error), dict(error.headers or {}))

    async def refused(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, DeltaError):
            raise error
        return _note(request, DeltaRefused(str(error), param=error.field))

    app.add_exception_handler(DeltaserveError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(DeltaError, refused)


def from_validation(error: ValidationError) -> InvalidRequest:
    """A body that does not fit its model, as one error that names the first offending field."""
    return first_problem(list(error.errors(include_url=False)))


def first_problem(problems: list[Any], skip: tuple[str, ...] = ()) -> InvalidRequest:
    """The first of pydantic's problems; ``skip`` drops leading location words such as ``body``."""
    problem = problems[0]
    location = [str(part) for part in problem["loc"] if not _is_union_arm(part)]
    if location and location[0] in skip:
        location = location[1:]
    param = ".".join(location) or _quoted_first(problem)
    if problem["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown or unsupported parameter: '{param}'.", param=param)
    if problem["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    message = str(problem["msg"]).removeprefix("Value error, ")
    return InvalidRequest(f"Invalid '{param}': {message}." if location else f"{message}.", param=param)


def _quoted_first(problem: Any) -> str | None:
    """A check over several fields has no location; its message quotes the field it is about first."""
    found = re.search(r"'(\w+)'", str(problem["msg"]))
    return found[1] if found else None


def _is_union_arm(part: object) -> bool:
    """Pydantic names the union's arm that it tried (``list[int]``, ``function-wrap[...]``): not a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _note(request: Request, error: DeltaserveError, headers: dict[str, str] | None = None) -> JSONResponse:
    request.scope.setdefault("state", {})["error_code"] = error.code
    response = error_response(error)
    for name, value in (headers or {}).items():
        response.headers[name] = value
    return response


def _from_http(request: Request, error: HTTPException) -> DeltaserveError:
    if error.status_code == 404:
        return NotFound(f"Unknown route: {request.method} {request.url.path}.", code="unknown_route")
    if error.status_code == 405:
        return MethodNotAllowed(f"{request.url.path} does not take {request.method}.")
    if error.status_code < 500:
        return InvalidRequest(str(error.detail))
    return DeltaserveError("Internal server error.")
