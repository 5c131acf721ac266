"""Registry and blobs together: what is registered has its file, and files nobody refers to go.

An upload of a digest and the removal of that digest's last version must not cross: the upload would find the
file there, and the removal would then take it away. One lock a digest keeps them apart. It is a lock of this
process, so a blob folder has one server at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from server.errors import InvalidRequest, NotFound
from server.store.blobs import BlobStore
from server.store.connect import StoreError
from server.store.delta_fields import DeltaFields
from server.store.job_records import JobEnding, StaleLease
from server.store.reference import check_name
from server.store.registry import Registry
from server.types import DeltaRecord, Visibility

Result = TypeVar("Result")

_SWEEP_SECONDS = 3600.0


class DeltaStore:
    """The only way by which deltas come and go. Reading goes to ``registry`` and ``blobs``.

    What was begun runs to its end even when the caller is cancelled (a client that hung up, say).
    """

    def __init__(self, registry: Registry, blobs: BlobStore) -> None:
        self.registry = registry
        self.blobs = blobs
        self._locks: dict[str, _CountedLock] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def start(self, *, older_than: float = _SWEEP_SECONDS) -> list[str]:
        """Make the blobs ready and drop files nobody refers to, left by a crash. Gives their digests.

        Only files stored ``older_than`` seconds ago go. Raises StoreError when the blobs are another
        registry's. Call it before anything is served.
        """
        await self.blobs.start()
        if not await self.blobs.claim(await self.registry.identity()):
            raise StoreError(
                "the stored deltas belong to another registry than the one connected to: "
                "give the --redis-url they were made with, or another --data-dir"
            )
        return await self.drop(await self.blobs.digests(older_than=older_than))

    async def add(
        self,
        tenant: str,
        name: str,
        fields: DeltaFields,
        source: Path,
        *,
        visibility: Visibility | None = None,
        promote: bool = True,
        ending: JobEnding | None = None,
    ) -> tuple[DeltaRecord, bool]:
        """Store the file ``source`` as ``fields.digest`` and register it; durable on return.

        Otherwise as ``Registry.add``; when that refuses, the file does not stay.
        """
        check_name(name)
        return await self._to_the_end(self._add(tenant, name, fields, source, visibility, promote, ending))

    async def delete(self, tenant: str, name: str, version: int | None = None) -> list[str]:
        """As ``Registry.delete``, and the files too. Gives the digests that are gone for good."""
        return await self._to_the_end(self._delete(tenant, name, version))

    async def drop(self, digests: Iterable[str]) -> list[str]:
        """Remove those files that no version refers to, as after ``TenantStore.delete``; their digests."""
        return await self._to_the_end(self._drop_all(digests))

    async def _add(
        self,
        tenant: str,
        name: str,
        fields: DeltaFields,
        source: Path,
        visibility: Visibility | None,
        promote: bool,
        ending: JobEnding | None,
    ) -> tuple[DeltaRecord, bool]:
        async with self._lock(fields.digest):
            await self.blobs.put(fields.digest, source)
            try:
                return await self.registry.add(
                    tenant, name, fields, visibility=visibility, promote=promote, ending=ending
                )
            except (InvalidRequest, NotFound, StaleLease):
                # After any other error the version may have been registered all the same: the file stays.
                await self._drop(fields.digest)
                raise

    async def _delete(self, tenant: str, name: str, version: int | None) -> list[str]:
        return await self._drop_all(await self.registry.delete(tenant, name, version))

    async def _drop_all(self, digests: Iterable[str]) -> list[str]:
        gone = []
        for digest in digests:
            async with self._lock(digest):
                if await self._drop(digest):
                    gone.append(digest)
        return gone

    async def _drop(self, digest: str) -> bool:
        if await self.registry.referenced(digest):
            return False
        await self.blobs.delete(digest)
        return True

    async def _to_the_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        # Cancelling would leave a thread of the blob store at work after its lock was freed.
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    @contextlib.asynccontextmanager
    async def _lock(self, digest: str) -> AsyncIterator[None]:
        counted = self._locks.setdefault(digest, _CountedLock())
        counted.users += 1
        try:
            async with counted.lock:
                yield
        finally:
            counted.users -= 1
            if not counted.users:
                del self._locks[digest]


class _CountedLock:
    """A lock that is forgotten when its last user, holder or waiter, has gone."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0
