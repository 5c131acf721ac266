"""The application: routers, error answers and the layers around every request."""

from __future__ import annotations

from fastapi import FastAPI

from server.api import errors
from server.api.middleware import RequestScope
from server.api.routes import (
    deltas,
    encode,
    files,
    fine_tuning,
    generate,
    health,
    metrics,
    models,
    tasks,
    tenants,
    tokenize,
)
from server.api.services import Services


def create_app(services: Services) -> FastAPI:
    """The app over ``services``, which the caller starts and stops."""
    app = FastAPI(
        title="deltaserve",
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    errors.install(app)
    app.add_middleware(RequestScope, services=services)
    modules = (
        health,
        metrics,
        models,
        generate,
        encode,
        deltas,
        tasks,
        files,
        fine_tuning,
        tokenize,
        tenants,
    )
    for module in modules:
        app.include_router(module.router)
    return app
