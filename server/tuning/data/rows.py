"""A file's rows as objects: JSONL, or CSV with a header; which of them is seen from the first line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from server.tuning.data.lines import LONGEST_LINE, Line, lines
from server.tuning.data.problems import RowError

# The csv module's bound on a field is the whole process's, and smaller than a line may be; nothing else here reads CSV.
csv.field_size_limit(LONGEST_LINE)


class Row(NamedTuple):
    """A row that could be read: ``values``; or not: ``error``. ``line`` is where it begins, from 1."""

    line: int
    values: dict[str, Any]
    error: RowError | None = None


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file in their order, blank lines left out. Every line that is no row comes as an error."""
    given = (line for line in lines(path) if line.text.strip() or line.error is not None)
    first = next(given, None)
    if first is None:
        return
    if not first.text or first.text.lstrip().startswith("{"):
        yield from _objects(first, given)
    elif first.text.lstrip().startswith("["):
        message = (
            "the file is one JSON array: write one object a line, without brackets and commas around them"
        )
        yield Row(first.number, {}, RowError("not_jsonl", message))
    elif "label" in (header := _header(first.text)):
        yield from _table(header, first, path)
    else:
        message = 'neither JSONL (each line an object: {"text": ..., "label": ...}) nor CSV with the header text,label'
        yield Row(first.number, {}, RowError("unknown_format", message))


def _objects(first: Line, given: Iterator[Line]) -> Iterator[Row]:
    decoder = msgspec.json.Decoder()
    yield _object(first, decoder)
    for line in given:
        yield _object(line, decoder)


def _object(line: Line, decoder: msgspec.json.Decoder[Any]) -> Row:
    if line.error is not None:
        return Row(line.number, {}, line.error)
    try:
        values = decoder.decode(line.text)
    except (msgspec.MsgspecError, RecursionError) as error:
        return Row(line.number, {}, RowError("invalid_json", f"the line is not a JSON object: {error}"))
    if not isinstance(values, dict):
        return Row(line.number, {}, RowError("invalid_json", "the line is JSON, but not an object ({...})"))
    return Row(line.number, values)


def _header(text: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([text], strict=True))]
    except csv.Error:
        return []


def _table(header: list[str], first: Line, path: Path) -> Iterator[Row]:
    """CSV from the header on. A quoted value may go over several lines."""
    if len(set(header)) < len(header):
        yield Row(first.number, {}, RowError("invalid_csv", "the header names a column twice"))
        return
    source = _Source(path, first.number)
    reader = csv.reader(source, strict=True)
    while True:
        source.begin()
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Row(
                source.start, {}, source.error or RowError("invalid_csv", f"the row is not CSV: {error}")
            )
            continue
        if values is None:
            return
        if source.error is not None:
            yield Row(source.start, {}, source.error)
        elif any(value.strip() for value in values):
            yield _record(source.start, header, values)


def _record(line: int, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        message = (
            f"the row has {len(values)} columns, the header {len(header)}: quote values that hold commas"
        )
        return Row(line, {}, RowError("invalid_csv", message))
    return Row(line, dict(zip(header, values, strict=True)))


class _Source:
    """Lines for the csv module, which knows where a row began and whether all of its lines were text."""

    def __init__(self, path: Path, header: int) -> None:
        self._lines = (line for line in lines(path) if line.number > header)
        self.begin()

    def begin(self) -> None:
        """A new row begins with the next line."""
        self.start = 0
        self.error: RowError | None = None

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.start = self.start or line.number
        self.error = self.error or line.error
        return line.text + "\n"
