"""From uploaded files to a registered delta: read strictly, stored durably, tried on the device, then named.

Nothing is acknowledged before the blob is synced and the registry has committed. Everything heavy runs in a
thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from deltas import formats
from deltas.delta import Delta
from deltas.formats import native
from deltas.formats.files import DeltaFiles
from deltas.weights import FrozenTensors
from server.api import placement
from server.api.archives import is_archive, unpack
from server.api.multipart import Form
from server.api.services import Backbone, Services
from server.errors import InvalidRequest
from server.store.acceptance import accept
from server.store.delta_fields import fields_of
from server.store.reference import check_name
from server.types import DeltaRecord, Principal, Visibility

_FIELDS = frozenset({"name", "promote", "visibility", "metadata"})
_MAX_METADATA = 16
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512


@dataclass(frozen=True)
class UploadFields:
    """The form's text fields, checked."""

    name: str
    promote: bool
    visibility: Visibility | None
    metadata: dict[str, str]


def parse_fields(form: Form, backbone_name: str) -> UploadFields:
    """The form's fields. Raises ``InvalidRequest`` naming the field."""
    for field in form.fields:
        if field not in _FIELDS:
            raise InvalidRequest(f"Unknown or unsupported parameter: '{field}'.", param=field)
    name = form.fields.get("name")
    if not name:
        raise InvalidRequest("Missing required parameter: 'name'.", param="name")
    check_name(name)
    if name == backbone_name:
        raise InvalidRequest(f"'{name}' is the backbone's name; a delta needs its own.", param="name")
    promote = form.fields.get("promote", "true").lower()
    if promote not in ("true", "false"):
        raise InvalidRequest("Invalid 'promote': must be true or false.", param="promote")
    if not form.files:
        raise InvalidRequest("Missing required parameter: 'file'.", param="file")
    visibility = _visibility(form.fields.get("visibility"))
    return UploadFields(name, promote == "true", visibility, _metadata(form.fields.get("metadata")))


def _visibility(text: str | None) -> Visibility | None:
    match text:
        case None | "private" | "public":
            return text
        case _:
            raise InvalidRequest("Invalid 'visibility': must be private or public.", param="visibility")


def _metadata(text: str | None) -> dict[str, str]:
    if not text:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("Invalid 'metadata': not JSON.", param="metadata") from error
    if not isinstance(data, dict) or len(data) > _MAX_METADATA:
        raise InvalidRequest(
            f"Invalid 'metadata': must be an object of at most {_MAX_METADATA} entries.", param="metadata"
        )
    for key, value in data.items():
        if not isinstance(value, str) or len(value) > _MAX_METADATA_VALUE or len(key) > _MAX_METADATA_KEY:
            raise InvalidRequest(
                f"Invalid 'metadata': keys of up to {_MAX_METADATA_KEY} and text values of up to "
                f"{_MAX_METADATA_VALUE} characters.",
                param="metadata",
            )
    return data


async def store(services: Services, caller: Principal, form: Form, folder: Path) -> tuple[DeltaRecord, bool]:
    """Make the form's files a version of the caller's delta; False: the same content was there already.

    Raises ``deltas.errors.DeltaError`` for files that are not an exactly servable delta, ``DeltaRefused`` for one that
    does not stand its first forward pass, ``InvalidRequest``.
    """
    backbone = services.accept_work()
    fields = parse_fields(form, backbone.info.name)
    limit = services.settings.max_upload_bytes
    native_file = folder / "native.safetensors"
    delta = await asyncio.to_thread(_convert, form.files, folder, limit, backbone, native_file)
    # Before anybody can name it.
    await accept(services.engine, services.registry, services.metrics, delta, native_file)
    return await services.deltas.add(
        caller.tenant,
        fields.name,
        fields_of(delta, backbone.info.name, fields.metadata),
        native_file,
        visibility=fields.visibility,
        promote=fields.promote,
    )


async def remove(services: Services, tenant: str, name: str, version: int | None) -> None:
    """Delete a delta or one version of it, and what nobody refers to any more. Raises ``ModelNotFound``."""
    async with placement.deleting(services):
        forget(services, await services.deltas.delete(tenant, name, version))


def forget(services: Services, digests: Iterable[str]) -> None:
    """Deltas that are gone for good leave the engine's tiers, once their running rows are done."""
    for digest in digests:
        services.engine.drop(digest)


def _convert(files: dict[str, Path], folder: Path, max_bytes: int, backbone: Backbone, target: Path) -> Delta:
    """Read the files and write the delta's native form to ``target``. Blocking."""
    if any(is_archive(name) for name in files):
        if len(files) != 1:
            raise InvalidRequest("An archive must be the only file of an upload.", param="file")
        ((name, path),) = files.items()
        files = unpack(path, name, folder, max_bytes)
    delta = formats.read(DeltaFiles(files), backbone.spec, FrozenTensors(Path(backbone.info.folder)))
    native.save(delta, target)
    return delta


@asynccontextmanager
async def upload_folder(services: Services) -> AsyncGenerator[Path, None]:
    """A folder for one upload, gone afterwards."""
    root = services.upload_folder
    root.mkdir(parents=True, exist_ok=True)
    folder = TemporaryDirectory(dir=root, prefix="upload-")
    try:
        yield Path(folder.name)
    finally:
        await asyncio.shield(asyncio.to_thread(folder.cleanup))
