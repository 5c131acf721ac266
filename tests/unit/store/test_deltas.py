from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.errors import InvalidRequest, ModelNotFound, NotFound
from server.store.blobs import FileBlobs
from server.store.connect import StoreError
from server.store.deltas import DeltaStore
from server.store.keys import Keys
from server.store.registry import Registry
from server.store.tenants import TenantStore
from tests.unit.store.records import digest_of, fields

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(redis: Redis, keys: Keys, tmp_path: Path) -> DeltaStore:
    made = DeltaStore(Registry(redis, keys), FileBlobs(tmp_path / "blobs"))
    assert await made.start() == []
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"tensors" * 1000)
    return path


async def test_add_and_delete(store: DeltaStore, source: Path) -> None:
    record, created = await store.add("default", "s", fields("x"), source)
    assert created
    assert store.blobs.path(record.digest).read_bytes() == source.read_bytes()
    await store.add("default", "t", fields("x"), source)
    assert await store.delete("default", "s") == []
    assert await store.blobs.exists(record.digest)
    assert await store.delete("default", "t", 1) == [record.digest]
    assert not await store.blobs.exists(record.digest)
    with pytest.raises(ModelNotFound):
        await store.delete("default", "t")


async def test_a_refused_add_leaves_no_file(store: DeltaStore, source: Path) -> None:
    with pytest.raises(NotFound):
        await store.add("nobody", "s", fields("x"), source)
    with pytest.raises(InvalidRequest):
        await store.add("default", "a/b", fields("x"), source)
    assert await store.blobs.digests() == []
    # Unless someone else has it.
    await store.add("default", "s", fields("x"), source)
    with pytest.raises(NotFound):
        await store.add("nobody", "s", fields("x"), source)
    assert await store.blobs.digests() == [digest_of("x")]


async def test_a_failed_put_registers_nothing(store: DeltaStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await store.add("default", "s", fields("x"), tmp_path / "none")
    with pytest.raises(ModelNotFound):
        await store.registry.resolve("default", "s")


async def test_uploads_and_deletes_of_one_digest_never_part_the_two(store: DeltaStore, source: Path) -> None:
    async def upload() -> None:
        await store.add("default", "s", fields("x"), source)

    async def delete() -> None:
        with contextlib.suppress(ModelNotFound):
            await store.delete("default", "s")

    for _ in range(20):
        await asyncio.gather(*(action() for action in [upload, delete, upload, delete, delete, upload]))
        registered = await store.registry.referenced(digest_of("x"))
        assert registered == await store.blobs.exists(digest_of("x"))
    assert store._locks == {}


async def test_a_cancelled_upload_is_whole_or_not_there(store: DeltaStore, source: Path) -> None:
    for i in range(20):
        task = asyncio.create_task(store.add("default", "s", fields(str(i)), source))
        for _ in range(i):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.gather(*store._running)
    for record in await store.registry.versions("default", "s"):
        assert await store.blobs.exists(record.digest)


async def test_files_of_a_crash_go_at_start(store: DeltaStore, source: Path) -> None:
    await store.add("default", "s", fields("kept"), source)
    await store.blobs.put(digest_of("lost"), source)
    assert await store.start() == []  # it may belong to an upload that is under way
    assert await store.start(older_than=0) == [digest_of("lost")]
    assert await store.blobs.digests() == [digest_of("kept")]


async def test_a_deleted_tenants_files_go(store: DeltaStore, redis: Redis, keys: Keys, source: Path) -> None:
    tenants = TenantStore(redis, keys, b"secret")
    await tenants.create("a")
    await store.add("a", "s", fields("own"), source)
    await store.add("a", "s", fields("shared"), source)
    await store.add("default", "s", fields("shared"), source)
    assert await store.drop(await tenants.delete("a")) == [digest_of("own")]
    assert await store.blobs.digests() == [digest_of("shared")]


async def test_blobs_of_another_registry_are_not_touched(
    store: DeltaStore, redis: Redis, source: Path
) -> None:
    await store.add("default", "s", fields("x"), source)
    other = DeltaStore(Registry(redis, Keys(f"{store.registry._keys.prefix}-other")), store.blobs)
    with pytest.raises(StoreError, match="another registry"):
        await other.start(older_than=0)
    assert await store.blobs.digests() == [digest_of("x")]
