"""Archives of a delta's files: unpacked member by member to files of our own naming. A member's path is never a path here.

Nothing an archive says of itself is believed: sizes are those of what comes out, and what it could hide (a second
directory, a second stream, anything behind its end) is refused, since ignoring it would be serving something else
than what was sent.
"""

from __future__ import annotations

import errno
import itertools
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, NoReturn, Protocol

from deltas.formats import adapterhub
from server.api.multipart import safe_name
from server.api.tars import members
from server.errors import InvalidRequest, TooLarge

MAX_MEMBERS = 64
MAX_RATIO = 100
"""How much larger than its compressed form a member may be; tensors shrink by little, texts by ten."""
FREE_BYTES = 16 << 20
"""What may come out whatever went in: small files of zeros are no bomb."""
_MAX_DIRECTORY_BYTES = 1 << 20  # of a zip: members' names and attributes
_MAX_DEPTH = 4
_PADDING = 1 << 20  # zeros at a tar's end: it comes in records of some blocks
_CHUNK = 1 << 20
_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_END_RECORD, _END_RECORD_64 = b"PK\x05\x06", b"PK\x06\x07"
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # in a zip entry's flags: the data, strongly, the directory

# What zipfile, tarfile and zlib raise over damaged input; overflows and lookups too, with numbers beyond reason.
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class Source(Protocol):
    """Where a member's bytes come from."""

    def read(self, size: int, /) -> bytes:
        """Up to so many; empty at the end."""


def is_archive(name: str) -> bool:
    """Whether a file of this name is taken as an archive."""
    return name.lower().endswith(_SUFFIXES)


def unpack(archive: Path, name: str, folder: Path, max_bytes: int) -> dict[str, Path]:
    """The archive's files by name, written into ``folder``. Blocking.

    A file's name is its last component. In a composition of adapters, and wherever two files share a last component,
    every name keeps the folders below the one that they have in common (``first/adapter_config.json``).

    Raises ``InvalidRequest`` that names the member for links, devices, absolute and climbing paths, repeated names, too
    many members, encrypted ones, archives in archives, bombs and whatever is not a plain archive; ``TooLarge`` beyond
    ``max_bytes`` unpacked in all.
    """
    target = _Target(folder, max_bytes)
    try:
        if name.lower().endswith(".zip"):
            _unzip(archive, target)
        else:
            _untar(archive, target, compressed=name.lower().endswith("gz"))
    except _BROKEN as error:
        _refuse(f"{name!r} cannot be read as an archive{target.where}: {error}.", error)
    except OSError as error:
        if (
            error.errno != errno.EINVAL
        ):  # a full disk is not the archive's fault; a seek to before its start is
            raise
        _refuse(f"{name!r} cannot be read as an archive{target.where}.", error)
    if not target.files:
        _refuse(f"{name!r} holds no files.")
    return target.named()


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    raise InvalidRequest(message, param="file") from cause


class _Target:
    """Where members go, and what they may add up to."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._left = max_bytes
        self._current: str | None = None
        self.files: dict[tuple[str, ...], Path] = {}

    @property
    def where(self) -> str:
        """For a message: the member that was being unpacked, if one was."""
        return "" if self._current is None else f" (at {self._current!r})"

    def add(self, member: str, source: Source, packed: int | None) -> None:
        """Write one member. ``packed`` is how many bytes of the archive hold it, where that is known."""
        self._current = member
        parts = self._parts(member)
        if parts in self.files:
            _refuse(f"Two of the archive's members are named {member!r}.")
        if is_archive(parts[-1]):
            _refuse(f"The archive's member {member!r} is an archive itself.")
        if len(self.files) >= MAX_MEMBERS:
            _refuse(f"The archive has more than {MAX_MEMBERS} members: {member!r} is one too many.")
        most = None if packed is None else FREE_BYTES + MAX_RATIO * packed
        local, written = self._folder / f"member-{len(self.files)}", 0
        with local.open("xb") as out:
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                if written > self._left:
                    raise TooLarge(f"The archive's files are larger than an upload may be, at {member!r}.")
                if most is not None and written > most:
                    _refuse_bomb(member)
                out.write(chunk)
        self._left -= written
        self.files[parts] = local
        self._current = None

    def named(self) -> dict[str, Path]:
        """The files by the names that the library gave them."""
        flat = {parts[-1]: path for parts, path in self.files.items()}
        if len(flat) == len(self.files) and adapterhub.SETUP not in flat:
            return flat
        levels = zip(*(parts[:-1] for parts in self.files), strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
        return {"/".join(parts[common:]): path for parts, path in self.files.items()}

    def _parts(self, member: str) -> tuple[str, ...]:
        path = member.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or ".." in parts or path[1:2] == ":":
            _refuse(f"The archive's member {member!r} leaves its folder.")
        if not path.isprintable() or not parts or path.endswith("/") or len(parts) > _MAX_DEPTH:
            _refuse(f"The archive's member {member!r} has no usable name.")
        return tuple(safe_name(part) for part in parts)


def _refuse_bomb(member: str) -> NoReturn:
    _refuse(
        f"The archive's member {member!r} unpacks to more than {MAX_RATIO} times its size: send the files as they are."
    )


# -- zip ---------------------------------------------------------------------------------------------------------


def _unzip(archive: Path, target: _Target) -> None:
    size = _check_directory(archive)
    with zipfile.ZipFile(archive) as opened:
        entries = opened.infolist()
        if sum(entry.compress_size for entry in entries) > size:
            _refuse("The zip archive's members share their bytes.")
        for entry in entries:
            name = entry.orig_filename  # zipfile cuts ``filename`` at a zero byte
            if entry.flag_bits & _ENCRYPTED:
                _refuse(f"The archive's member {name!r} is encrypted.")
            mode = stat.S_IFMT(entry.external_attr >> 16)
            if entry.is_dir() and mode in (0, stat.S_IFDIR):
                continue
            if mode not in (0, stat.S_IFREG):
                _refuse(f"The archive's member {name!r} is not a file.")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                _refuse(f"The archive's member {name!r} is compressed otherwise than by deflate.")
            with opened.open(entry) as source:
                target.add(name, source, entry.compress_size)


def _check_directory(archive: Path) -> int:
    """``zipfile`` reads the whole directory into memory: bound its size first, from the record at the end.

    Gives the archive's size.
    """
    with archive.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read()
    record = tail.rfind(_END_RECORD)
    # a second signature, or a 64-bit record, would let the archive show two directories
    if (
        record < 0
        or len(tail) - record < 22
        or tail.count(_END_RECORD) != 1
        or _END_RECORD_64 in tail[:record][-20:]
    ):
        _refuse("The zip archive has no plain directory.")
    (directory,) = struct.unpack_from("<I", tail, record + 12)
    if directory > _MAX_DIRECTORY_BYTES:
        _refuse(f"The archive has more than {MAX_MEMBERS} members.")
    return size


# -- tar ---------------------------------------------------------------------------------------------------------


def _untar(archive: Path, target: _Target, *, compressed: bool) -> None:
    with archive.open("rb") as raw:
        stream = _Inflated(raw, target) if compressed else raw
        for name, source in members(stream):
            target.add(name, source, None)
        rest = stream.read(_PADDING + 1)
        if len(rest) > _PADDING or rest.strip(b"\0"):
            _refuse("The archive goes on after its end.")


class _Inflated:
    """A gzip file's content, read once from front to end, with an eye on how much comes out of how little."""

    def __init__(self, raw: IO[bytes], target: _Target) -> None:
        self._raw = raw
        self._target = target
        self._inflate = zlib.decompressobj(wbits=31)  # gzip's header and checksum, one stream
        self._pending = b""
        self._taken = self._given = 0

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes, fewer only at the end. Raises ``zlib.error``, ``EOFError`` and ``InvalidRequest``."""
        out = bytearray()
        while len(out) < size and not self._inflate.eof:
            ended = False
            if not self._pending:
                self._pending = self._raw.read(1 << 16)
                self._taken += len(self._pending)
                ended = not self._pending
            chunk = self._inflate.decompress(self._pending, size - len(out))
            self._pending = self._inflate.unconsumed_tail
            if ended and not chunk and not self._inflate.eof:
                raise EOFError("the compressed data is cut short")
            out += chunk
        if self._inflate.eof and (self._inflate.unused_data + self._raw.read(_CHUNK)).strip(b"\0"):
            _refuse("The compressed data goes on after its end.")
        self._given += len(out)
        if self._given > FREE_BYTES + MAX_RATIO * self._taken:
            _refuse(
                f"The archive unpacks to more than {MAX_RATIO} times its size{self._target.where}: "
                "send the files as they are."
            )
        return bytes(out)
