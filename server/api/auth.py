"""Who sent the request. Routers carry one of these dependencies; a route without one cannot be added."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.api.services import Services
from server.errors import PermissionDenied
from server.types import Principal


def services_of(request: Request) -> Services:
    """The services of the app that got this request."""
    services: Services = request.app.state.services
    return services


async def authenticate(request: Request) -> Principal:
    """The key's principal. Raises ``AuthenticationFailed``; runs before anything of the body is read."""
    principal = await services_of(request).authenticator.authenticate(request.headers.get("authorization"))
    request.state.tenant = principal.tenant
    return principal


async def authenticate_admin(request: Request) -> Principal:
    """As ``authenticate``, for the admin key only. Raises ``PermissionDenied`` for a tenant's key."""
    principal = await authenticate(request)
    if not principal.admin:
        raise PermissionDenied("This route needs the admin key.")
    return principal


async def authenticate_metrics(request: Request) -> None:
    """The admin key, unless the server was started with ``--metrics-open``."""
    if not services_of(request).settings.metrics_open:
        await authenticate_admin(request)


Served = Annotated[Services, Depends(services_of)]
Caller = Annotated[Principal, Depends(authenticate)]
