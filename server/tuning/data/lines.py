"""A file's lines as text: bounded, numbered, each with its own error if it is no text."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from server.tuning.data.problems import RowError

LONGEST_LINE = 4 << 20  # bytes

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Line(NamedTuple):
    """``text`` without its line end; ``error`` where it is not the whole line or no text. ``number`` counts from 1."""

    number: int
    text: str
    error: RowError | None = None


def lines(path: Path) -> Iterator[Line]:
    """The lines of a UTF-8 file, blank ones too. A byte order mark and CRs before line ends are no part of them.

    Never holds more than one line of at most LONGEST_LINE bytes.
    """
    with path.open("rb") as file:
        start = file.read(3)
        if start.startswith(_UTF16):
            yield Line(1, "", RowError("not_utf8", "the file is UTF-16: save it as UTF-8"))
            return
        file.seek(3 if start == codecs.BOM_UTF8 else 0)
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                if not raw.endswith(b"\n"):
                    _skip_line(file)
                message = f"the line has more than {LONGEST_LINE} bytes"
                yield Line(number, "", RowError("line_too_long", message))
                continue
            yield _line(number, raw)


def _line(number: int, raw: bytes) -> Line:
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return Line(number, raw.decode())
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
        return Line(number, raw.decode(errors="replace"), RowError("not_utf8", message))


def _skip_line(file: BinaryIO) -> None:
    while (raw := file.readline(LONGEST_LINE)) and not raw.endswith(b"\n"):
        pass
