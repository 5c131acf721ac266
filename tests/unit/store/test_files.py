from __future__ import annotations

import os
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.errors import InvalidRequest, NotFound
from server.store.files import FileStore, new_id
from server.store.keys import Keys
from server.store.tenants import TenantStore

pytestmark = pytest.mark.anyio


@pytest.fixture
async def files(redis: Redis, keys: Keys, tmp_path: Path) -> FileStore:
    store = FileStore(redis, keys, tmp_path / "files")
    assert await store.start() == []
    return store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"text,label\n" * 1000)
    return path


def on_disk(files: FileStore) -> set[str]:
    return {path.name for path in files.root.glob("??/*")}


async def test_add_get_delete(files: FileStore, source: Path) -> None:
    made = await files.add("default", "a.csv", "fine-tune", source)
    assert await files.get("default", made.id) == made
    assert made.bytes == source.stat().st_size
    assert files.path(made).read_bytes() == source.read_bytes()
    again = await files.add("default", "b.csv", "fine-tune-results", source, file_id=made.id)
    assert [item.filename for item in (await files.list("default")).items] == ["b.csv"]
    assert again.id == made.id
    await files.delete("default", made.id)
    for call in (files.get("default", made.id), files.delete("default", made.id), files.get("default", "x")):
        with pytest.raises(NotFound):
            await call
    assert on_disk(files) == set()


async def test_tenants_do_not_see_each_other(
    files: FileStore, source: Path, redis: Redis, keys: Keys
) -> None:
    tenants = TenantStore(redis, keys, b"s" * 32)
    await tenants.create("acme")
    made = await files.add("acme", "a.csv", "fine-tune", source)
    kept = await files.add("default", "a.csv", "fine-tune", source)
    for call in (files.get("default", made.id), files.delete("default", made.id)):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(NotFound, match="tenant"):
        await files.add("nobody", "a.csv", "fine-tune", source)
    assert on_disk(files) == {made.id, kept.id}
    ids = await files.ids("acme")
    assert ids == [made.id]
    await tenants.delete("acme")
    assert await files.drop([*ids, kept.id]) == [made.id]
    assert on_disk(files) == {kept.id}
    assert [key async for key in redis.scan_iter(f"{keys.prefix}:t:acme:*")] == []


async def test_pages(files: FileStore, source: Path) -> None:
    made = [
        await files.add("default", str(n), "fine-tune" if n % 2 else "user_data", source) for n in range(6)
    ]
    ids = [item.id for item in made]

    async def page(*arguments: object, **named: object) -> tuple[list[str], bool]:
        found = await files.list("default", *arguments, **named)  # type: ignore[arg-type]
        return [item.id for item in found.items], found.has_more

    assert await page() == (ids[::-1], False)
    assert await page(None, 4) == (ids[:1:-1], True)
    assert await page(ids[2], 4) == (ids[1::-1], False)
    assert await page(ids[2], 2, order="asc") == (ids[3:5], True)
    assert await page(None, 2, purpose="fine-tune") == ([ids[5], ids[3]], True)
    assert await page(ids[3], 2, purpose="fine-tune") == ([ids[1]], False)
    for after in ("x", new_id()):
        with pytest.raises(InvalidRequest):
            await files.list("default", after)


async def test_what_a_crash_left_goes_at_start(files: FileStore, source: Path) -> None:
    kept = await files.add("default", "a.csv", "fine-tune", source)
    name = new_id()
    lost = files.root / name[5:7] / name
    half = lost.with_name(".tmp-1-2")
    lost.parent.mkdir(exist_ok=True)
    for path in (lost, half):
        path.write_bytes(b"x")
    assert await files.start() == []
    for path in (lost, half):
        os.utime(path, (0, 0))
    assert await files.start() == [lost.name]
    assert on_disk(files) == {kept.id}
