"""What is wrong with the rows of two files: all of it in a report on disk, the first few at hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import BinaryIO

import msgspec

from server.errors import DatasetInvalid
from server.types import BadRow

SHOWN = 20  # bad rows of an error answer
SHOWN_LINES = 5  # of a warning
MOST_WARNINGS = 100  # different ones

TRAINING, VALIDATION = "training_file", "validation_file"
FILES = (TRAINING, VALIDATION)


class RowError(Exception):
    """Why one row cannot be used. ``field`` is the row's key, as ``messages[2].content``; None: the row as a whole."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field


class DataWarning(msgspec.Struct, frozen=True):
    """Something about a file that can be trained on all the same. ``lines`` are the first of ``count``."""

    file: str
    code: str
    message: str
    count: int
    lines: list[int]


class Problems:
    """Collects errors of rows, and warnings. ``report`` takes every bad row as a line of JSON."""

    def __init__(self, report: BinaryIO) -> None:
        self._report = report
        self._encoder = msgspec.json.Encoder()
        self._first: dict[str, BadRow] = {}
        self._shown: list[BadRow] = []
        self._counts: Counter[str] = Counter()
        self._warnings: dict[tuple[str, str, str], tuple[int, list[int]]] = {}

    def bad(self, file: str, line: int | None, error: RowError) -> None:
        """A row that cannot be used."""
        row = BadRow(file, line, error.field, error.code, error.message)
        self._counts[file] += 1
        self._first.setdefault(file, row)
        if len(self._shown) < SHOWN:
            self._shown.append(row)
        self._report.write(self._encoder.encode(row._asdict()) + b"\n")

    def warn(self, file: str, code: str, message: str, count: int, lines: list[int]) -> None:
        """``count`` rows of which ``message`` is true; ``lines`` are the first ones. The same warning adds up."""
        key = (file, code, message)
        if key in self._warnings or len(self._warnings) < MOST_WARNINGS:
            before, first = self._warnings.get(key, (0, []))
            self._warnings[key] = before + count, [*first, *lines][:SHOWN_LINES]

    @property
    def any(self) -> bool:
        return bool(self._counts)

    def warnings(self) -> list[DataWarning]:
        """Each once, in the order in which they first came."""
        return [
            DataWarning(file, code, message, count, lines)
            for (file, code, message), (count, lines) in self._warnings.items()
        ]

    def error(self, report: Path) -> DatasetInvalid:
        """All of them as one error; ``report`` is where they were written."""
        file = next(name for name in FILES if self._counts[name])
        first = self._first[file]
        where = "" if first.line is None else f"line {first.line}: "
        count = self._counts.total()
        rest = "" if count == 1 else f" ({count} problems in all; 'rows' has the first {len(self._shown)})"
        message = f"The {file.replace('_', ' ')} cannot be used: {where}{first.message}{rest}"
        return DatasetInvalid(message, param=file, rows=self._shown, count=count, report=report)
