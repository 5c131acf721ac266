"""The tenants' files: data sets that they upload, results that jobs leave. Content on disk, index in Redis.

``ROOT/ab/file-abcd...``: one file an id, never written to again. It appears under its name only when it is complete and
synced, and it is entered into the index after that; it leaves the index before it leaves the disk. So whatever is
listed is whole, and what a crash left over is swept at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from redis.asyncio import Redis

from server.errors import InvalidRequest, NotFound
from server.store.connect import as_text, load_script
from server.store.durable import copy_file, make_folder, sync_folder
from server.store.keys import Keys
from server.store.reference import shown
from server.types import DEFAULT_TENANT, Page

Purpose = Literal["fine-tune", "fine-tune-results", "assistants", "batch", "vision", "user_data", "evals"]
Order = Literal["asc", "desc"]

LARGEST_PAGE = 10_000
_ID = re.compile(r"file-[0-9a-f]{32}")
_SWEEP_SECONDS = 3600.0


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file. ``bytes`` is its size, ``created_at`` in Unix seconds."""

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int


class FileStore:
    """All tenants' files. A tenant reaches its own only. Methods raise Unavailable while Redis cannot be reached."""

    def __init__(self, redis: Redis, keys: Keys, root: Path) -> None:
        self.root = root
        self._redis = redis
        self._keys = keys
        self._put = load_script(redis, "file_put")
        self._page = load_script(redis, "files_page")
        self._delete = load_script(redis, "file_delete")

    async def start(self, *, older_than: float = _SWEEP_SECONDS) -> Sequence[str]:
        """Make the folder ready and drop contents that the index does not know; their ids.

        Only those written ``older_than`` seconds ago go: younger ones may be on their way into the index.
        """
        await asyncio.to_thread(make_folder, self.root)
        return await self.drop(await asyncio.to_thread(self._found, older_than))

    async def add(
        self, tenant: str, filename: str, purpose: Purpose, source: Path, *, file_id: str | None = None
    ) -> FileRecord:
        """Keep a copy of the file ``source``; durable on return. The same ``file_id`` again replaces it.

        Raises NotFound (no such tenant), OSError (disk full, say); then nothing stays.
        """
        record = FileRecord(
            id=new_id() if file_id is None else file_id,
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=(await asyncio.to_thread(source.stat)).st_size,
            created_at=int(time.time()),
        )
        await asyncio.to_thread(self._copy, source, self._path(record.id))
        keys = self._keys
        made = await self._put(
            keys=[keys.tenants, keys.files(tenant), keys.file_order(tenant), keys.counts, keys.file_owners],
            args=[tenant, int(tenant != DEFAULT_TENANT), record.id, msgspec.json.encode(record)],
        )
        if not made:
            await self.drop([record.id])
            raise NotFound(f"tenant {shown(tenant)} does not exist", param="tenant")
        return record

    async def get(self, tenant: str, file_id: str, param: str = "file_id") -> FileRecord:
        """The tenant's own file. Raises NotFound, whose ``param`` is the given one."""
        record = await self._redis.hget(self._keys.files(tenant), file_id) if _ID.fullmatch(file_id) else None
        if record is None:
            raise _no_file(file_id, param)
        return msgspec.json.decode(record, type=FileRecord)

    def path(self, record: FileRecord) -> Path:
        """Where the content is. It is never written to; it goes when the file is deleted."""
        return self._path(record.id)

    async def list(
        self,
        tenant: str,
        after: str | None = None,
        limit: int = LARGEST_PAGE,
        *,
        order: Order = "desc",
        purpose: str | None = None,
    ) -> Page:
        """A page of the tenant's own files, by when they came. ``after`` is the last id of the page before.

        Raises InvalidRequest when ``after`` is gone.
        """
        rows = None
        if after is None or _ID.fullmatch(after):
            keys = [self._keys.files(tenant), self._keys.file_order(tenant)]
            rows = await self._page(keys=keys, args=[after or "", limit, order, purpose or ""])
        if rows is None:
            raise InvalidRequest(f"there is no file {shown(after or '')} to go on after", param="after")
        items = [msgspec.json.decode(row, type=FileRecord) for row in rows[1:]]
        return Page(items=items, has_more=bool(rows[0]))

    async def ids(self, tenant: str) -> Sequence[str]:
        """The ids of all the tenant's files."""
        return [as_text(file_id) for file_id in await self._redis.hkeys(self._keys.files(tenant))]

    async def delete(self, tenant: str, file_id: str) -> None:
        """Forget the tenant's own file and its content. Raises NotFound."""
        keys = [self._keys.files(tenant), self._keys.file_order(tenant), self._keys.file_owners]
        if not (_ID.fullmatch(file_id) and await self._delete(keys=keys, args=[file_id])):
            raise _no_file(file_id, "file_id")
        await asyncio.to_thread(self._unlink, file_id)

    async def drop(self, ids: Iterable[str]) -> Sequence[str]:
        """Remove the contents of those that no tenant has, as after ``TenantStore.delete``; their ids."""
        gone = []
        for file_id in ids:
            if not await self._redis.hexists(self._keys.file_owners, file_id):
                await asyncio.to_thread(self._unlink, file_id)
                gone.append(file_id)
        return gone

    def _path(self, file_id: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise ValueError(f"not a file's id: {file_id[:80]!r}")
        return self.root / file_id[5:7] / file_id

    def _copy(self, source: Path, path: Path) -> None:
        make_folder(path.parent)
        copy_file(source, path)

    def _unlink(self, file_id: str) -> None:
        path = self._path(file_id)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def _found(self, older_than: float) -> Sequence[str]:
        """Ids of contents on disk. What an interrupted copy left goes here."""
        latest = time.time() - older_than
        ids = []
        for path in self.root.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > latest:
                    continue
                if _ID.fullmatch(path.name):
                    ids.append(path.name)
                else:
                    path.unlink()
        return sorted(ids)


def new_id() -> str:
    """An id that nobody can guess."""
    return f"file-{secrets.token_hex(16)}"


def _no_file(file_id: str, param: str) -> NotFound:
    return NotFound(f"the file {shown(file_id)} does not exist", param=param)
