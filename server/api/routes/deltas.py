"""``/v1/deltas``: upload, versions, aliases, content, deletion."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from server.api import content, idempotency, placement, uploads
from server.api.auth import Caller, Served, authenticate
from server.api.body import read_json
from server.api.delta_objects import delta_object
from server.api.multipart import receive_form
from server.api.paging import After, Limit, listing
from server.api.schemas import AliasRequest, ResidencyRequest
from server.api.services import Services
from server.errors import PermissionDenied
from server.types import LIVE, DeltaRecord


def _kind(request: Request) -> None:
    request.state.kind = "delta"


router = APIRouter(prefix="/v1/deltas", dependencies=[Depends(authenticate), Depends(_kind)])

Version = Annotated[int, Path(ge=1, lt=2**53)]


@router.post("")
async def upload(request: Request, services: Served, caller: Caller) -> Response:
    """A new version from files: 201; 200 with the existing version where the content is the same."""
    services.accept_work()
    async with uploads.upload_folder(services) as folder:
        form = await receive_form(request, folder, services.settings.max_upload_bytes)

        async def make() -> tuple[int, dict[str, object]]:
            record, created = await uploads.store(services, caller, form, folder)
            return 201 if created else 200, await _shown(services, record)

        return await idempotency.once(request, services, caller.tenant, form.fingerprint, make)


@router.get("")
async def list_deltas(services: Served, caller: Caller, after: After = None, limit: Limit = 20) -> Response:
    """The caller's deltas, oldest first, each by its live version. ``after`` is the last name seen."""
    page = await services.registry.list(caller.tenant, after, limit)
    names = [record.name for record in page.items]
    aliases = await services.registry.aliases_of(caller.tenant, names)
    return listing([delta_object(item, aliases[item.name]) for item in page.items], page.has_more)


@router.get("/{name}")
async def get_delta(name: str, services: Served, caller: Caller) -> Response:
    """The live version."""
    record = await services.registry.resolve(caller.tenant, f"{name}@{LIVE}")
    return JSONResponse(await _shown(services, record))


@router.get("/{name}/versions")
async def list_versions(name: str, services: Served, caller: Caller) -> Response:
    """Every version, oldest first."""
    records = await services.registry.versions(caller.tenant, name)
    aliases = await services.registry.aliases(caller.tenant, name)
    return listing([delta_object(record, aliases) for record in records])


@router.get("/{name}/versions/{version}")
async def get_version(name: str, version: Version, services: Served, caller: Caller) -> Response:
    """One version."""
    record = await services.registry.get(caller.tenant, name, version)
    return JSONResponse(await _shown(services, record))


@router.get("/{name}/versions/{version}/content")
async def get_content(
    name: str,
    version: Version,
    services: Served,
    caller: Caller,
    form: Annotated[Literal["native", "peft"], Query(alias="format")] = "native",
) -> Response:
    """A tar of the native file, or of PEFT's where PEFT has such deltas."""
    record = await services.registry.get(caller.tenant, name, version)
    if form == "peft":
        return await content.peft_tar(services, record)
    return content.native_tar(services, record)


@router.put("/{name}/aliases/{alias}")
async def put_alias(name: str, alias: str, request: Request, services: Served, caller: Caller) -> Response:
    """Point an alias at a version, at once for every request that comes after."""
    body = await read_json(request, AliasRequest)
    await services.registry.set_alias(caller.tenant, name, alias, body.version)
    record = await services.registry.get(caller.tenant, name, body.version)
    return JSONResponse(await _shown(services, record))


@router.get("/{name:path}/residency")
async def get_residency(name: str, services: Served, caller: Caller) -> Response:
    """The tier that holds a version; ``name`` is as a request's ``model``, but no sum."""
    record = await services.registry.resolve(caller.tenant, name)
    return JSONResponse(await placement.show(services, record))


@router.put("/{name:path}/residency")
async def put_residency(name: str, request: Request, services: Served, caller: Caller) -> Response:
    """Bring a version of the caller's own to a tier, pinned or not; answered when it is there."""
    body = await read_json(request, ResidencyRequest)
    record = await services.registry.resolve(caller.tenant, name)
    if record.tenant != caller.tenant:
        raise PermissionDenied("Only its owner places and pins a delta.", param="name")
    placed = await placement.place(services, record, body.tier, pinned=body.pinned)
    return JSONResponse(placed)


@router.delete("/{name}")
async def delete_delta(name: str, services: Served, caller: Caller) -> Response:
    """Delete every version. Running requests finish."""
    await uploads.remove(services, caller.tenant, name, None)
    return JSONResponse({"id": name, "object": "delta", "deleted": True})


@router.delete("/{name}/versions/{version}")
async def delete_version(name: str, version: Version, services: Served, caller: Caller) -> Response:
    """Delete one version. Running requests finish."""
    await uploads.remove(services, caller.tenant, name, version)
    return JSONResponse({"id": f"{name}@{version}", "object": "delta", "deleted": True})


async def _shown(services: Services, record: DeltaRecord) -> dict[str, object]:
    return delta_object(record, await services.registry.aliases(record.tenant, record.name))
