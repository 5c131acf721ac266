"""``/v1/files``: data sets to tune on, and what jobs leave."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from server.api import idempotency, uploads
from server.api.auth import Caller, Served, authenticate
from server.api.multipart import Form, receive_form
from server.api.paging import After
from server.errors import InvalidRequest
from server.store.files import LARGEST_PAGE, FileRecord, Order, Purpose

_UPLOADED: tuple[Purpose, ...] = tuple(p for p in get_args(Purpose) if p != "fine-tune-results")


def _kind(request: Request) -> None:
    request.state.kind = "file"


router = APIRouter(prefix="/v1/files", dependencies=[Depends(authenticate), Depends(_kind)])


@router.post("")
async def upload(request: Request, services: Served, caller: Caller) -> Response:
    """Keep a file."""
    async with uploads.upload_folder(services) as folder:
        form = await receive_form(request, folder, services.settings.max_file_bytes)
        purpose = _purpose(form)

        async def make() -> tuple[int, dict[str, Any]]:
            ((name, path),) = form.files.items()
            return 200, file_object(await services.files.add(caller.tenant, name, purpose, path))

        return await idempotency.once(request, services, caller.tenant, form.fingerprint, make)


@router.get("")
async def list_files(
    services: Served,
    caller: Caller,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=LARGEST_PAGE)] = LARGEST_PAGE,
    order: Order = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """The caller's files. ``after`` is the last id seen."""
    page = await services.files.list(caller.tenant, after, limit, order=order, purpose=purpose)
    data = [file_object(item) for item in page.items]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, "has_more": page.has_more, **ends})


@router.get("/{file_id}")
async def get_file(file_id: str, services: Served, caller: Caller) -> Response:
    """One file."""
    return JSONResponse(file_object(await services.files.get(caller.tenant, file_id)))


@router.get("/{file_id}/content")
async def get_content(file_id: str, services: Served, caller: Caller) -> Response:
    """What is in it."""
    record = await services.files.get(caller.tenant, file_id)
    path = services.files.path(record)
    return FileResponse(path, media_type="application/octet-stream", filename=record.filename)


@router.delete("/{file_id}")
async def delete_file(file_id: str, services: Served, caller: Caller) -> Response:
    """Forget a file. A job that was made with it does not need it any more."""
    await services.files.delete(caller.tenant, file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def file_object(record: FileRecord) -> dict[str, Any]:
    """OpenAI's ``file`` object."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": None,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


def _purpose(form: Form) -> Purpose:
    """The form's purpose, once the form is checked. Raises InvalidRequest naming the field."""
    for field in form.fields:
        if field != "purpose":
            raise InvalidRequest(f"Unknown or unsupported parameter: '{field}'.", param=field)
    if len(form.files) != 1:
        raise InvalidRequest("One 'file' is needed.", param="file")
    given = form.fields.get("purpose")
    if given is None:
        raise InvalidRequest("Missing required parameter: 'purpose'.", param="purpose")
    for purpose in _UPLOADED:
        if purpose == given:
            return purpose
    raise InvalidRequest(f"Invalid 'purpose': must be one of {', '.join(_UPLOADED)}.", param="purpose")
