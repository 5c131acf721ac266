"""Archives of a delta's files: unpacked flat, member by member, with every size known before it is
believed.
"""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from server.api.multipart import safe_name
from server.errors import InvalidRequest, TooLarge

MAX_MEMBERS = 64
_MAX_DIRECTORY_BYTES = 1 << 20  # of a zip: members' names and attributes
_MAX_ENTRIES = 4 * MAX_MEMBERS  # with folders
_CHUNK = 1 << 20
_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")


def is_archive(name: str) -> bool:
    """Whether a file of this name is taken as an archive."""
    return name.lower().endswith(_SUFFIXES)


def unpack(archive: Path, name: str, folder: Path, max_bytes: int) -> dict[str, Path]:
    """The archive's files by base name, written into ``folder``. Blocking.

    Raises ``InvalidRequest`` for links, absolute or climbing paths, repeated names, too many members and
    anything that is not a plain archive; ``TooLarge`` beyond ``max_bytes`` unpacked in all.
    """
    target = _Target(folder, max_bytes)
    try:
        if name.lower().endswith(".zip"):
            _unzip(archive, target)
        else:
            _untar(archive, target, compressed=name.lower().endswith("gz"))
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        gzip.BadGzipFile,
        EOFError,
        struct.error,
    ) as error:
        raise InvalidRequest(f"{name!r} cannot be read as an archive: {error}.", param="file") from error
    except (NotImplementedError, RuntimeError, ValueError) as error:  # zipfile: odd compression, passwords
        raise InvalidRequest(f"{name!r} cannot be unpacked: {error}.", param="file") from error
    if not target.files:
        raise InvalidRequest(f"{name!r} holds no files.", param="file")
    return target.files


class _Target:
    """Where members go, and what they may add up to."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._left = max_bytes
        self.files: dict[str, Path] = {}

    def add(self, member: str, source: IO[bytes]) -> None:
        """Write one member. What is counted is what comes out, not what the archive says."""
        path = member.replace("\\", "/")
        if path.startswith("/") or ".." in path.split("/") or path[1:2] == ":":
            raise InvalidRequest(f"The archive's member {member!r} leaves its folder.", param="file")
        name = safe_name(path)
        if name in self.files:
            raise InvalidRequest(f"Two of the archive's members are named {name!r}.", param="file")
        if len(self.files) >= MAX_MEMBERS:
            raise InvalidRequest(f"The archive has more than {MAX_MEMBERS} members.", param="file")
        local = self._folder / f"member-{len(self.files)}"
        with local.open("xb") as out:
            while chunk := source.read(_CHUNK):
                self._left -= len(chunk)
                if self._left < 0:
                    raise TooLarge("The archive's files are larger than an upload may be.")
                out.write(chunk)
        self.files[name] = local


def _unzip(archive: Path, target: _Target) -> None:
    _check_directory(archive)
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            if entry.is_dir():
                continue
            mode = entry.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise InvalidRequest(f"The archive's member {entry.filename!r} is not a file.", param="file")
            with opened.open(entry) as source:
                target.add(entry.filename, source)


def _check_directory(archive: Path) -> None:
    """``zipfile`` reads the whole directory into memory: bound its size first, from the record at the end."""
    with archive.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read()
    record = tail.rfind(b"PK\x05\x06")
    # a second signature, or a 64-bit record, would let the archive show two directories
    if (
        record < 0
        or len(tail) - record < 22
        or tail.count(b"PK\x05\x06") != 1
        or b"PK\x06\x07" in tail[:record][-20:]
    ):
        raise InvalidRequest("The zip archive has no plain directory.", param="file")
    (directory,) = struct.unpack_from("<I", tail, record + 12)
    if directory > _MAX_DIRECTORY_BYTES:
        raise InvalidRequest(f"The archive has more than {MAX_MEMBERS} members.", param="file")


def _untar(archive: Path, target: _Target, *, compressed: bool) -> None:
    raw: IO[bytes] = gzip.open(archive) if compressed else archive.open("rb")  # type: ignore[assignment]  # noqa: SIM115
    with raw, tarfile.open(fileobj=_Bounded(raw), mode="r:") as opened:
        for count, entry in enumerate(opened):
            if count >= _MAX_ENTRIES:
                raise InvalidRequest(f"The archive has more than {MAX_MEMBERS} members.", param="file")
            if entry.isdir():
                continue
            source = opened.extractfile(entry) if entry.isreg() and not entry.issparse() else None
            if source is None:
                raise InvalidRequest(f"The archive's member {entry.name!r} is not a file.", param="file")
            with source:
                target.add(entry.name, source)


class _Bounded(io.RawIOBase):
    """A reader that refuses large single reads: ``tarfile`` reads extended headers of any size in one."""

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__()
        self._raw = raw

    def read(self, size: int = -1, /) -> bytes:
        """As a file's, up to 1 MiB."""
        if size < 0 or size > _CHUNK:
            raise tarfile.ReadError("a header is too large")
        return self._raw.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As a file's."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """As a file's."""
        return self._raw.tell()

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Through ``read``, in at most 1 MiB."""
        data = self.read(min(len(buffer), _CHUNK))
        buffer[: len(data)] = data
        return len(data)
