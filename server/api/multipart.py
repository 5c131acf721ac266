"""Multipart uploads, streamed to files: nothing of a file is held in memory, nothing is trusted in its
name.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.api.body import check_length
from server.errors import InvalidRequest, TooLarge

MAX_FILES = 64
MAX_FIELDS = 16
MAX_FIELD_BYTES = 64 << 10
MAX_HEADER_BYTES = 8 << 10
OVERHEAD_BYTES = 1 << 20  # of boundaries, part headers and fields, beyond the files themselves
_WRITE_BYTES = 1 << 20

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f]")


@dataclass
class Form:
    """What came: text fields, and files by base name. ``fingerprint`` is a sha256 over all of it."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    fingerprint: str = ""


async def receive_form(request: Request, folder: Path, max_bytes: int, file_field: str = "file") -> Form:
    """Stream the body's ``file_field`` parts into ``folder`` (which must exist) and read its fields.

    Raises ``TooLarge`` beyond ``max_bytes``, ``InvalidRequest`` for anything malformed, repeated or
    unexpected.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("The body must be multipart/form-data.")
    limit = max_bytes + OVERHEAD_BYTES
    check_length(request, limit)
    receiver = _Receiver(folder, file_field)
    parser = MultipartParser(boundary, receiver.callbacks(), max_size=float("inf"))
    pending = bytearray()
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise TooLarge(f"The upload is larger than the {max_bytes} bytes allowed.")
            pending += chunk
            if len(pending) >= _WRITE_BYTES:
                await asyncio.to_thread(parser.write, bytes(pending))
                pending.clear()
        await asyncio.to_thread(parser.write, bytes(pending))
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest("The multipart body is malformed.") from error
    finally:
        receiver.close()
    if not receiver.ended:
        raise InvalidRequest("The multipart body is cut short.")
    return receiver.form()


def safe_name(name: str) -> str:
    """The last component of a file's name. Raises ``InvalidRequest`` for one that cannot be a plain
    file's.
    """
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    if base in ("", ".", "..") or _FORBIDDEN.search(base) or len(base.encode()) > 255:
        raise InvalidRequest(f"{name!r} is not a usable file name.", param="file")
    return base


class _Receiver:
    """The parser's callbacks: a part's header decides whether its data is a field or goes to a file."""

    def __init__(self, folder: Path, file_field: str) -> None:
        self._folder = folder
        self._file_field = file_field
        self._form = Form()
        self._sha = hashlib.sha256()
        self._part = hashlib.sha256()
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._field: str | None = None
        self._value = bytearray()
        self._out: IO[bytes] | None = None
        self.ended = False

    def callbacks(self) -> Any:
        """As ``MultipartParser`` takes them."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._name,
            "on_header_value": self._header,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def form(self) -> Form:
        """Everything that was received."""
        self._form.fingerprint = self._sha.hexdigest()
        return self._form

    def close(self) -> None:
        """Close the file of a part that was cut short."""
        if self._out is not None:
            self._out.close()
            self._out = None

    def _begin(self) -> None:
        self._disposition = b""
        self._field = None
        self._value.clear()
        self._part = hashlib.sha256()

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._check_header()

    def _header(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header_name) + len(self._header_value) > MAX_HEADER_BYTES:
            raise InvalidRequest("A part's header is too long.")

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequest("A part of the multipart body has no name.")
        name = options[b"name"].decode("utf-8", "replace")
        given = options.get(b"filename")
        self._note(name, given or b"")
        if given is None:
            if name in self._form.fields:
                raise InvalidRequest(f"The field '{name}' is given twice.", param=name)
            if len(self._form.fields) >= MAX_FIELDS:
                raise InvalidRequest("Too many fields.")
            self._field = name
            return
        if name != self._file_field:
            raise InvalidRequest(f"Unknown file part: '{name}'.", param=name)
        base = safe_name(given.decode("utf-8", "replace"))
        if base in self._form.files:
            raise InvalidRequest(f"Two files are named {base!r}.", param="file")
        if len(self._form.files) >= MAX_FILES:
            raise InvalidRequest(f"At most {MAX_FILES} files are taken.", param="file")
        path = self._folder / f"part-{len(self._form.files)}"
        self._form.files[base] = path
        self._out = path.open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._part.update(memoryview(data)[start:end])
        if self._out is not None:
            self._out.write(memoryview(data)[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"The field '{self._field}' is too long.", param=self._field)

    def _end(self) -> None:
        self._sha.update(self._part.digest())
        self.close()
        if self._field is not None:
            try:
                self._form.fields[self._field] = self._value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidRequest(f"'{self._field}' is not UTF-8.", param=self._field) from error
            self._field = None

    def _finish(self) -> None:
        self.ended = True

    def _note(self, name: str, filename: bytes) -> None:
        """Names count for the fingerprint, with their lengths, so that no two forms look the same."""
        for item in (name.encode(), filename):
            self._sha.update(len(item).to_bytes(4, "little") + item)
