"""Files as they come: byte order marks, line ends, bad bytes, bad JSON, bad CSV, lines without an end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tuning.data import lines
from server.tuning.data.rows import rows

ROW = '{"text": "é", "label": "a"}'
VALUES = {"text": "é", "label": "a"}


def read(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Each row's line with its values, or the code of what is wrong with it."""
    path.write_bytes(content)
    return [(row.line, row.values if row.error is None else row.error.code) for row in rows(path)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f"{ROW}\n{ROW}".encode(), [(1, VALUES), (2, VALUES)]),
        (f"\ufeff{ROW}\r\n\r\n  \n{ROW}\r\n".encode(), [(1, VALUES), (4, VALUES)]),
        (f"\n\n{ROW}".encode(), [(3, VALUES)]),
        (
            f"{ROW}\nnull\n[1]\n{{\n{ROW} x\n".encode(),
            [(1, VALUES), *((n, "invalid_json") for n in (2, 3, 4, 5))],
        ),
        (ROW.encode() + b'\n{"text": "\xff"}\n' + ROW.encode(), [(1, VALUES), (2, "not_utf8"), (3, VALUES)]),
        (b'{"text": "\xff"}\n' + ROW.encode(), [(1, "not_utf8"), (2, VALUES)]),
        (b'{"text": "\\ud800"}', [(1, "invalid_json")]),
        (b'{"a":' * 100_000, [(1, "invalid_json")]),
        (ROW.encode("utf-16"), [(1, "not_utf8")]),
        (f"[\n{ROW},\n{ROW}]".encode(), [(1, "not_jsonl")]),
        (b"a b c\nd", [(1, "unknown_format")]),
        (b"", []),
        (b"\n \r\n\n", []),
    ],
)
def test_objects(tmp_path: Path, content: bytes, found: list[tuple[int, object]]) -> None:
    assert read(tmp_path / "x", content) == found


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("text,label\né,a\n", [(2, VALUES)]),
        ("\ufefflabel , text\r\na,é\r\n\r\na,é", [(2, VALUES), (4, VALUES)]),
        ('text,label\n"é\n\nb",a\né,a\n', [(2, {"text": "é\n\nb", "label": "a"}), (5, VALUES)]),
        ('text,label\n"a ""b"", c",a\n', [(2, {"text": 'a "b", c', "label": "a"})]),
        ("text,label\na,b,c\né,a\nb\n", [(2, "invalid_csv"), (3, VALUES), (4, "invalid_csv")]),
        ('text,label\n"a"b,c\né,a\n', [(2, "invalid_csv"), (3, VALUES)]),
        ("text,text,label\n", [(1, "invalid_csv")]),
        ("text,label", []),
    ],
)
def test_tables(tmp_path: Path, content: str, found: list[tuple[int, object]]) -> None:
    assert read(tmp_path / "x", content.encode()) == found


def test_bad_bytes_of_a_table(tmp_path: Path) -> None:
    content = b'text,label\n"a\n' + b"\xe9\n" + 'b",a\né,a\n'.encode()
    assert read(tmp_path / "x", content) == [(2, "not_utf8"), (5, VALUES)]


def test_long_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    found = read(tmp_path / "x", b"x" * 1000 + b"\n" + ROW.encode() + b"\n" + b"y" * 101)
    assert found == [(1, "line_too_long"), (2, VALUES), (3, "line_too_long")]


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    found = read(tmp_path_factory.mktemp("any") / "x", content)
    assert [line for line, _ in found] == sorted({line for line, _ in found})
