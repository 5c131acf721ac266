"""Writing to disk so that it is still there after a power cut. Everything here blocks."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new, renamed, removed names) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make the folder and its parents (mode 0700), each durable in its own parent. It may exist already."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")


def write_temporary(folder: Path, content: bytes) -> Path:
    """A new file (mode 0600) with this content, synced, under a name nobody else uses."""
    path = folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; when the block ends it is at ``path`` (mode 0600), durable; if the block raises, nothing changes."""
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Give the file this content (mode 0600), all or nothing."""
    with replacing(path) as file:
        file.write(content)


def create_file(path: Path, content: bytes) -> bool:
    """Make the file (mode 0600) with this content unless it exists; of several callers at once, one wins.

    True when this call made it. The file is never seen half written.
    """
    temporary = write_temporary(path.parent, content)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def copy_file(source: Path, path: Path) -> None:
    """Give ``source``'s content the name ``path`` (mode 0600), all or nothing."""
    with replacing(path) as writing, source.open("rb") as reading:
        shutil.copyfileobj(reading, writing, 1 << 20)
