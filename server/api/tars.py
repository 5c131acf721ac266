"""The members of a tar, read from front to end: the little of the format that plain files need.

Python's own reader takes whatever tars ever held: sparse maps of any length, extended headers inside extended
headers, seeks that unpack a compressed stream again from its start. Here a header is a block that ``tarfile`` decodes,
an extended header may give its member a name and a size, and everything that is neither a file nor a folder is
refused.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Protocol

from server.errors import InvalidRequest

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADERS = 1024  # of all kinds: each costs little, but not nothing
_MAX_EXTENDED_BYTES = 1 << 16
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=]{1,255})=")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NAMES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class Stream(Protocol):
    """Bytes in order; fewer than asked for only at the end."""

    def read(self, size: int, /) -> bytes: ...


class Member:
    """The bytes of one member, to be read before the next one is asked for."""

    def __init__(self, stream: Stream | IO[bytes], size: int) -> None:
        self._stream = stream
        self.left = size

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; empty at the end. Raises ``tarfile.ReadError`` where the tar is cut short."""
        chunk = self._stream.read(min(size, self.left))
        if not chunk and min(size, self.left):
            raise tarfile.ReadError("it is cut short")
        self.left -= len(chunk)
        return chunk


def members(stream: Stream | IO[bytes]) -> Iterator[tuple[str, Member]]:
    """Name and bytes of every file, up to the block of zeros that ends a tar.

    Raises ``tarfile.TarError`` for what is not a tar and ``InvalidRequest``, naming the member, for what is neither a
    file nor a folder.
    """
    named: dict[str, str] = {}  # by an extended header, for the next member
    for _ in range(_MAX_HEADERS):
        block = _exactly(stream, _BLOCK)
        if not block.strip(b"\0"):
            if named:
                raise tarfile.ReadError("an extended header without a member")
            return
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if info.size < 0:
            raise tarfile.ReadError("a negative size")
        match info.type:
            case tarfile.XHDTYPE | tarfile.SOLARIS_XHDTYPE:
                named |= _records(_extended(stream, info.size))
            case tarfile.XGLTYPE:
                if _records(_extended(stream, info.size)).keys() & {"path", "size"}:
                    raise InvalidRequest(
                        "The archive's global header names or sizes its members.", param="file"
                    )
            case tarfile.GNUTYPE_LONGNAME:
                named["path"] = _text(_extended(stream, info.size).rstrip(b"\0"))
            case tarfile.GNUTYPE_LONGLINK:
                _extended(stream, info.size)
            case _:
                yield from _member(stream, info, named)
                named = {}
    raise InvalidRequest(f"The archive has more than {_MAX_HEADERS} headers.", param="file")


def _member(
    stream: Stream | IO[bytes], info: tarfile.TarInfo, named: dict[str, str]
) -> Iterator[tuple[str, Member]]:
    name = named.get("path", info.name)
    if info.type == tarfile.DIRTYPE:
        return
    if info.type not in _FILES or any(key.startswith("GNU.sparse") for key in named):
        kind = _NAMES.get(info.type, "of an unknown kind") if info.type not in _FILES else "a sparse file"
        raise InvalidRequest(f"The archive's member {name!r} is not a file but {kind}.", param="file")
    size = _size(named["size"]) if "size" in named else info.size
    member = Member(stream, size)
    yield name, member
    while member.read(1 << 20):
        pass  # what the caller left of it
    _exactly(stream, -size % _BLOCK)


def _extended(stream: Stream | IO[bytes], size: int) -> bytes:
    if size > _MAX_EXTENDED_BYTES:
        raise tarfile.ReadError(f"an extended header of {size} bytes")
    data = _exactly(stream, size)
    _exactly(stream, -size % _BLOCK)
    return data


def _records(data: bytes) -> dict[str, str]:
    """The keywords and values of a pax header: lines of ``LENGTH KEYWORD=VALUE``."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        match = _RECORD.match(data, at)
        if match is None:
            raise tarfile.ReadError("a malformed extended header")
        end = at + int(match[1])
        if end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a malformed extended header")
        found[_text(match[2])] = _text(data[match.end() : end - 1])
        at = end
    return found


def _size(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII):
        raise tarfile.ReadError("a malformed size")
    return int(text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _exactly(stream: Stream | IO[bytes], size: int) -> bytes:
    data = stream.read(size) if size else b""
    if len(data) != size:
        raise tarfile.ReadError("it is cut short")
    return data
