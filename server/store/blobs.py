"""Deltas' tensors on disk: one immutable file a digest.

``ROOT/ab/cd/abcd....safetensors``. A file appears under its name only when it is complete and synced, so
whatever is visible is whole, also after a power cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import BinaryIO, Protocol

from server.store.durable import create_file, make_folder, sync_folder

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_CHUNK = 1 << 20  # bytes


class BlobStore(Protocol):
    """Content-addressed files. ``digest`` is 64 lower-case hexadecimal digits everywhere; else ValueError."""

    async def start(self) -> None:
        """Make ready; call once before anything else. Cleans up what an interrupted put left."""

    async def put(self, digest: str, source: Path) -> None:
        """Store a copy of the file ``source``; durable on return. Storing a digest again changes nothing.

        The content is not checked against the digest: the caller has computed it.
        """

    def path(self, digest: str) -> Path:
        """The local file of a stored digest. It is never written to again."""

    async def exists(self, digest: str) -> bool:
        """Whether the digest is stored."""

    async def delete(self, digest: str) -> None:
        """Remove the digest, if it is there. Processes that have the file open keep it."""

    async def digests(self, *, older_than: float = 0.0) -> list[str]:
        """All stored digests, sorted; those last put at least ``older_than`` seconds ago."""

    async def claim(self, owner: str) -> bool:
        """Bind the store to the registry with this identity. False when it holds another registry's blobs."""


class FileBlobs:
    """A BlobStore in a local folder. Several processes may share the folder. I/O happens in threads."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._temporary = self.root / "tmp"

    async def start(self) -> None:
        """See BlobStore. Raises OSError when the folder cannot be used."""
        await asyncio.to_thread(self._start)

    async def put(self, digest: str, source: Path) -> None:
        """See BlobStore. Raises OSError (disk full, say); nothing is visible then."""
        await asyncio.to_thread(self._put, self.path(digest), source)

    def path(self, digest: str) -> Path:
        """See BlobStore."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a digest: {digest[:80]!r}")
        return self.root / digest[:2] / digest[2:4] / f"{digest}{_SUFFIX}"

    async def exists(self, digest: str) -> bool:
        """See BlobStore."""
        return await asyncio.to_thread(self.path(digest).exists)

    async def delete(self, digest: str) -> None:
        """See BlobStore."""
        await asyncio.to_thread(self._delete, self.path(digest))

    async def digests(self, *, older_than: float = 0.0) -> list[str]:
        """See BlobStore."""
        return await asyncio.to_thread(self._digests, older_than)

    async def claim(self, owner: str) -> bool:
        """See BlobStore. The owner stands in the file ``owner`` in the folder."""
        return await asyncio.to_thread(self._claim, owner)

    def _start(self) -> None:
        make_folder(self._temporary)
        for path in self._temporary.iterdir():
            _remove_if_left(path)

    def _put(self, path: Path, source: Path) -> None:
        try:
            os.utime(path)
        except FileNotFoundError:
            make_folder(path.parent)
            self._copy(source, path)
        # Also when it was there: another put may have renamed it without having come this far yet.
        for folder in (path.parent, path.parent.parent, self.root):
            sync_folder(folder)

    def _copy(self, source: Path, path: Path) -> None:
        """Give ``source``'s content the name ``path`` once all of it is on the disk."""
        with source.open("rb") as reading, self._temporary_file() as writing:
            temporary = Path(writing.name)
            try:
                shutil.copyfileobj(reading, writing, _CHUNK)
                writing.flush()
                os.fchmod(writing.fileno(), 0o440)
                os.fsync(writing.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _temporary_file(self) -> BinaryIO:
        """A new file in the store's file system, locked while it is open so that no ``_start`` removes it."""
        while True:
            path = self._temporary / secrets.token_hex(16)
            file = open(path, "xb", opener=_owner_only)  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # Removed before it was locked.

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def _digests(self, older_than: float) -> list[str]:
        found = []
        latest = time.time() - older_than
        for path in self.root.glob(f"??/??/*{_SUFFIX}"):
            digest = path.name.removesuffix(_SUFFIX)
            with contextlib.suppress(FileNotFoundError):
                if _DIGEST.fullmatch(digest) and path.stat().st_mtime <= latest:
                    found.append(digest)
        return sorted(found)

    def _claim(self, owner: str) -> bool:
        path = self.root / "owner"
        if not path.exists() and self._digests(0.0):
            return False
        create_file(path, owner.encode())
        return path.read_bytes() == owner.encode()


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _remove_if_left(path: Path) -> None:
    """Remove a temporary file unless a live process is at work on it."""
    with contextlib.ExitStack() as closing:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # It was just renamed: not a leftover.
        closing.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        path.unlink(missing_ok=True)
