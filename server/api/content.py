"""A version's content: a tar of the native file, or of PEFT's two files, made when they are asked for."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltas.errors import DeltaError
from deltas.formats import native, peft_writer
from deltas.weights import FrozenTensors
from server.api.services import Backbone, Services
from server.errors import Conflict, NotFound
from server.types import DeltaRecord

_CHUNK = 1 << 20
_GONE = "This version's content is gone."


def native_tar(services: Services, record: DeltaRecord) -> Response:
    """The stored file. Raises ``NotFound`` if it is not there any more."""
    return Tar(
        {native.WEIGHTS: services.blobs.path(record.digest)},
        f"{record.name}-{record.version}.tar",
        record.created_at,
        {"x-delta-digest": record.digest},
    )


async def peft_tar(services: Services, record: DeltaRecord) -> Response:
    """The delta as PEFT's files. One is made at a time, since each holds a whole delta in memory.

    Raises ``Conflict`` where PEFT has no such delta, ``NotFound`` if the stored file is not there any more,
    ``Unavailable`` until the backbone's sites are known.
    """
    backbone = services.backbone()
    services.upload_folder.mkdir(parents=True, exist_ok=True)
    async with services.exporting:
        return await asyncio.to_thread(_peft_tar, services, backbone, record)


def _peft_tar(services: Services, backbone: Backbone, record: DeltaRecord) -> Response:
    # The tar holds the files open, so their folder may go before it is sent.
    with TemporaryDirectory(dir=services.upload_folder, prefix="export-") as made:
        folder = Path(made)
        try:
            delta = native.load(services.blobs.path(record.digest))
        except FileNotFoundError as error:
            raise NotFound(_GONE) from error
        try:
            files = peft_writer.save(
                delta,
                backbone.spec,
                folder,
                source=FrozenTensors(Path(backbone.info.folder)),
                base_model=record.metadata.get("base_model_name_or_path", record.backbone),
            )
        except DeltaError as error:
            raise Conflict(f"This version has no PEFT form: {error}", param="format") from error
        return Tar(
            {path.name: path for path in files},
            f"{record.name}-{record.version}.peft.tar",
            record.created_at,
            {"x-delta-digest": record.digest},
        )


class Tar(Response):
    """A tar of some files, streamed from the disk. Raises ``NotFound`` if one of them is not there."""

    media_type = "application/x-tar"

    def __init__(
        self, members: Mapping[str, Path], name: str, modified: int, headers: Mapping[str, str]
    ) -> None:
        self._members: list[tuple[bytes, IO[bytes], int]] = []
        with ExitStack() as opened:
            for member, path in members.items():
                try:
                    file = opened.enter_context(path.open("rb"))
                except FileNotFoundError as error:
                    raise NotFound(_GONE) from error
                info = tarfile.TarInfo(member)
                info.size, info.mtime, info.mode = path.stat().st_size, modified, 0o644
                self._members.append((info.tobuf(tarfile.PAX_FORMAT), file, info.size))
            self._opened = opened.pop_all()
        self.status_code = 200
        self.background = None
        self.body = b""
        length = 2 * tarfile.BLOCKSIZE + sum(
            len(head) + size + _padding(size) for head, _, size in self._members
        )
        self.init_headers(
            {
                **headers,
                "content-length": str(length),
                "content-disposition": f'attachment; filename="{name}"',
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send every member, then the end."""
        del scope, receive

        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        with self._opened:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for head, file, size in self._members:
                await body(head)
                left = size
                while left:
                    chunk = await asyncio.to_thread(file.read, min(left, _CHUNK))
                    if not chunk:
                        raise OSError("the file became shorter while it was read")
                    left -= len(chunk)
                    await body(chunk)
                await body(b"\0" * _padding(size))
            await body(b"\0" * (2 * tarfile.BLOCKSIZE), more=False)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
