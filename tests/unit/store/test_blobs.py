from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.store import blobs as module
from server.store.blobs import BlobStore, FileBlobs
from tests.unit.store.records import digest_of

pytestmark = pytest.mark.anyio

DIGEST = digest_of("x")


@pytest.fixture
async def blobs(tmp_path: Path) -> FileBlobs:
    store = FileBlobs(tmp_path / "blobs")
    await store.start()
    return store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(3_000_000))
    return path


async def test_put_read_delete(blobs: FileBlobs, source: Path) -> None:
    store: BlobStore = blobs  # FileBlobs is one
    assert not await store.exists(DIGEST)
    await store.put(DIGEST, source)
    assert await store.exists(DIGEST)
    path = store.path(DIGEST)
    assert path == blobs.root / DIGEST[:2] / DIGEST[2:4] / f"{DIGEST}.safetensors"
    assert path.read_bytes() == source.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o440
    assert await store.digests() == [DIGEST]
    with path.open("rb") as reading:
        await store.delete(DIGEST)
        await store.delete(DIGEST)
        assert reading.read() == source.read_bytes()  # whoever has it open keeps it
    assert not await store.exists(DIGEST)
    assert await store.digests() == []
    await store.put(DIGEST, source)
    assert await store.exists(DIGEST)


async def test_putting_again_changes_nothing(blobs: FileBlobs, source: Path) -> None:
    await blobs.put(DIGEST, source)
    before = blobs.path(DIGEST).read_bytes(), blobs.path(DIGEST).stat().st_ino
    source.write_bytes(b"other")
    await blobs.put(DIGEST, source)
    assert (blobs.path(DIGEST).read_bytes(), blobs.path(DIGEST).stat().st_ino) == before


@pytest.mark.parametrize(
    "digest", ["", "../../etc/passwd", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n", "g" * 64]
)
async def test_what_is_no_digest(blobs: FileBlobs, source: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        await blobs.put(digest, source)
    with pytest.raises(ValueError, match="not a digest"):
        blobs.path(digest)


async def test_parallel_puts_of_one_digest(blobs: FileBlobs, source: Path) -> None:
    """While they run, the file is either not there or whole."""
    size = source.stat().st_size
    done = threading.Event()
    sizes = set()

    def watch() -> None:
        while not done.is_set():
            try:
                sizes.add(blobs.path(DIGEST).stat().st_size)
            except FileNotFoundError:
                sizes.add(-1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        await asyncio.gather(*(blobs.put(DIGEST, source) for _ in range(20)))
    finally:
        done.set()
        watcher.join()
    assert sizes <= {-1, size}
    assert blobs.path(DIGEST).read_bytes() == source.read_bytes()
    assert list((blobs.root / "tmp").iterdir()) == []


async def test_a_failed_put_leaves_nothing(
    blobs: FileBlobs, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        await blobs.put(DIGEST, tmp_path / "none")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            await blobs.put(DIGEST, source)
    assert not await blobs.exists(DIGEST)
    assert list((blobs.root / "tmp").iterdir()) == []
    await blobs.put(DIGEST, source)


async def test_order_of_what_makes_it_durable(
    blobs: FileBlobs, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File synced, then renamed, then the folders synced up to the root."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        seen.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    def recorded_replace(path: Path, target: Path) -> Path:
        seen.append(f"rename {target}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    await blobs.put(DIGEST, source)
    path = blobs.path(DIGEST)
    rename = seen.index(f"rename {path}")
    assert seen[rename - 1].startswith(f"sync {blobs.root}/tmp/")
    folders = [f"sync {folder}" for folder in (path.parent, path.parent.parent, blobs.root)]
    assert seen[rename + 1 :] == folders
    # A second put may come between the first one's rename and its syncs: it makes sure for itself.
    seen.clear()
    await blobs.put(DIGEST, source)
    assert seen == folders


async def test_leftovers_are_cleaned_at_start(blobs: FileBlobs, source: Path) -> None:
    await blobs.put(DIGEST, source)
    left = blobs.root / "tmp" / "left"
    busy = blobs.root / "tmp" / "busy"
    left.write_bytes(b"half")
    busy.write_bytes(b"half")
    with busy.open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)  # as a put in another process does
        await FileBlobs(blobs.root).start()
        assert not left.exists()
        assert busy.exists()
    await FileBlobs(blobs.root).start()
    assert not busy.exists()
    assert await blobs.digests() == [DIGEST]


_PUT_FOREVER = """
import asyncio, hashlib, sys
from pathlib import Path
from server.store.blobs import FileBlobs

async def main():
    store = FileBlobs(Path(sys.argv[1]))
    await store.start()
    for i in range(100_000):
        digest = hashlib.sha256(str(i).encode()).hexdigest()
        await store.put(digest, Path(sys.argv[2]))
        print(digest, flush=True)

asyncio.run(main())
"""


async def test_kill_9_during_puts(blobs: FileBlobs, source: Path) -> None:
    """What was acknowledged is there; whatever is visible is whole; no temporary file stays."""
    command = [sys.executable, "-c", _PUT_FOREVER, str(blobs.root), str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        acknowledged = [(await asyncio.to_thread(other.stdout.readline)).strip() for _ in range(10)]
        other.kill()
    await blobs.start()
    stored = await blobs.digests()
    assert set(stored) >= set(acknowledged)
    content = source.read_bytes()
    for digest in stored:
        assert blobs.path(digest).read_bytes() == content
    assert list((blobs.root / "tmp").iterdir()) == []


async def test_age_of_blobs(blobs: FileBlobs, source: Path) -> None:
    await blobs.put(DIGEST, source)
    os.utime(blobs.path(DIGEST), (1, 1))
    assert await blobs.digests(older_than=3600) == [DIGEST]
    await blobs.put(DIGEST, source)  # young again
    assert await blobs.digests(older_than=3600) == []


async def test_one_owner(blobs: FileBlobs, source: Path, tmp_path: Path) -> None:
    assert await blobs.claim("one")
    assert await blobs.claim("one")
    assert not await blobs.claim("two")
    other = FileBlobs(tmp_path / "other")
    await other.start()
    await other.put(DIGEST, source)
    assert not await other.claim("one")  # blobs whose owner nobody knows


def test_chunks_are_bounded() -> None:
    """A large delta is not read into memory whole."""
    assert module._CHUNK <= 1 << 24
