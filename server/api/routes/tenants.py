"""``/v1/tenants``: tenants and their keys, for the admin key only."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.api import idempotency, placement, tuning, uploads
from server.api.auth import Served, authenticate_admin
from server.api.body import parse_json, read_body
from server.api.paging import After, Limit, listing
from server.api.schemas import TenantPatch, TenantRequest
from server.types import DEFAULT_TENANT, ApiKey, Tenant


def _kind(request: Request) -> None:
    request.state.kind = "tenant"


router = APIRouter(prefix="/v1/tenants", dependencies=[Depends(authenticate_admin), Depends(_kind)])


@router.post("")
async def create_tenant(request: Request, services: Served) -> Response:
    """A tenant and its first key, which is shown this once."""
    raw = await read_body(request)
    body = parse_json(raw, TenantRequest)

    async def make() -> tuple[int, dict[str, Any]]:
        tenant = await services.tenants.create(body.name, body.limits or {})
        key, secret = await services.tenants.create_key(tenant.name)
        return 201, {**_tenant(tenant), "key": secret, "key_id": key.id}

    return await idempotency.once(request, services, DEFAULT_TENANT, _sha(raw), make, secret=True)


@router.get("")
async def list_tenants(services: Served, after: After = None, limit: Limit = 20) -> Response:
    """All tenants, oldest first. ``after`` is the last name seen."""
    page = await services.tenants.list(after, limit)
    return listing([_tenant(tenant) for tenant in page.items], page.has_more)


@router.get("/{name}")
async def get_tenant(name: str, services: Served) -> Response:
    """One tenant."""
    return JSONResponse(_tenant(await services.tenants.get(name)))


@router.patch("/{name}")
async def patch_tenant(name: str, request: Request, services: Served) -> Response:
    """New limits."""
    body = parse_json(await read_body(request), TenantPatch)
    return JSONResponse(_tenant(await services.tenants.patch(name, body.limits)))


@router.delete("/{name}")
async def delete_tenant(name: str, services: Served) -> Response:
    """Delete a tenant with its keys, deltas, files and jobs."""
    files = await services.files.ids(name)
    async with placement.deleting(services):
        uploads.forget(services, await services.deltas.drop(await services.tenants.delete(name)))
    await services.files.drop(files)
    await tuning.sweep(services)
    services.metrics.forget_tenant(name)
    return JSONResponse({"id": name, "object": "tenant", "deleted": True})


@router.post("/{name}/keys")
async def create_key(name: str, request: Request, services: Served) -> Response:
    """One more key, which is shown this once."""
    raw = await read_body(request)

    async def make() -> tuple[int, dict[str, Any]]:
        key, secret = await services.tenants.create_key(name)
        return 201, {**_key(key), "key": secret}

    return await idempotency.once(request, services, DEFAULT_TENANT, _sha(raw), make, secret=True)


@router.get("/{name}/keys")
async def list_keys(name: str, services: Served) -> Response:
    """A tenant's keys, without their secrets."""
    return listing([_key(key) for key in await services.tenants.list_keys(name)])


@router.delete("/{name}/keys/{key_id}")
async def revoke_key(name: str, key_id: str, services: Served) -> Response:
    """Revoke a key, from the next request on."""
    await services.tenants.revoke_key(name, key_id)
    return JSONResponse({"id": key_id, "object": "key", "deleted": True})


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.name,
        "object": "tenant",
        "name": tenant.name,
        "limits": tenant.limits,
        "created_at": tenant.created_at,
    }


def _key(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "key",
        "tenant": key.tenant,
        "hint": key.hint,
        "created_at": key.created_at,
    }


def _sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
