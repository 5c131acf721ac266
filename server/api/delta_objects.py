"""Delta objects as the API shows them, and a version's content as a tar."""

from __future__ import annotations

import asyncio
import tarfile
from pathlib import Path
from typing import IO, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import NotFound
from server.types import DeltaRecord

_CHUNK = 1 << 20


def delta_object(record: DeltaRecord, aliases: dict[str, int]) -> dict[str, Any]:
    """The ``delta`` object of one version; ``aliases`` are its name's, of which its own are shown."""
    return {
        "id": record.id,
        "object": "delta",
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "methods": record.methods,
        "format": record.format,
        "backbone": record.backbone,
        "parameters": record.parameters,
        "bytes": record.bytes,
        "rank": record.rank,
        "sites": record.sites,
        "task_kind": record.task_kind,
        "labels": record.labels,
        "status": record.status,
        "aliases": sorted(alias for alias, version in aliases.items() if version == record.version),
        "visibility": record.visibility,
        "created_at": record.created_at,
        "metadata": record.metadata,
    }


class TarOfOne(Response):
    """A tar that holds one file, streamed from the disk. Raises ``NotFound`` if the file is not there."""

    media_type = "application/x-tar"

    def __init__(self, path: Path, member: str, name: str, modified: int, headers: dict[str, str]) -> None:
        try:
            self._file: IO[bytes] = path.open("rb")
        except FileNotFoundError as error:
            raise NotFound("This version's content is gone.") from error
        self._size = path.stat().st_size
        info = tarfile.TarInfo(member)
        info.size, info.mtime, info.mode = self._size, modified, 0o644
        self._head = info.tobuf(tarfile.PAX_FORMAT)
        self._tail = b"\0" * (-self._size % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
        self.status_code = 200
        self.background = None
        self.body = b""
        length = len(self._head) + self._size + len(self._tail)
        self.init_headers(
            {
                **headers,
                "content-length": str(length),
                "content-disposition": f'attachment; filename="{name}"',
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send head, file and tail."""
        del scope, receive
        with self._file:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._head, "more_body": True})
            left = self._size
            while left:
                chunk = await asyncio.to_thread(self._file.read, min(left, _CHUNK))
                if not chunk:
                    raise OSError("the file became shorter while it was read")
                left -= len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": self._tail, "more_body": False})
