"""Headers: whatever a client sends is refused before anything is allocated for it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats.files import MAX_JSON_BYTES, DeltaFiles
from deltas.formats.header import MAX_HEADER_BYTES, MAX_TENSORS, read_header

Write = Callable[..., Path]


def entry(shape: list[Any], start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(path: Path, kind: type[DeltaError] = InvalidDelta) -> DeltaError:
    """The error, made without allocating much."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            read_header(path, "x.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.field
    return caught.value


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(())},
        path,
        {"k": "v"},
    )
    header = read_header(path, path.name)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": (torch.float32, (2, 3)),
        "b": (torch.bfloat16, (5,)),
        "c": (torch.float32, ()),
    }
    assert header.metadata == {"k": "v"}


GOOD = {"a": entry([2], 0, 8)}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry([2], 0, 7)}, 7),
        ({"a": entry([2], 0, 16)}, 16),
        ({"a": entry([2], 0, 8)}, 7),
        ({"a": entry([2], 0, 8)}, 9),
        ({"a": entry([2], 4, 12)}, 12),
        ({"a": entry([2], 8, 0)}, 8),
        ({"a": entry([2], -8, 0)}, 8),
        ({"a": entry([-2], 0, 8)}, 8),
        ({"a": entry([-2, -1], 0, 8)}, 8),
        ({"a": entry([10**12], 0, 8)}, 8),
        ({"a": entry([10**12], 0, 4 * 10**12)}, 8),
        ({"a": entry([2**40, 2**40], 0, 2**82)}, 8),
        ({"a": entry([2**63], 0, 8)}, 8),
        ({"a": entry([0, 10**12], 0, 8)}, 8),
        ({"a": entry([1] * 9, 0, 4)}, 4),
        ({"a": entry([2.0], 0, 8)}, 8),
        ({"a": entry([True, 2], 0, 8)}, 8),
        ({"a": entry(["2"], 0, 8)}, 8),
        ({"a": entry([2], 0.0, 8)}, 8),
        ({"a": entry([2], None, 8)}, 8),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": entry([2], 0, 8) | {"more": 1}}, 8),
        ({"a": []}, 8),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20),
        ({"": entry([2], 0, 8)}, 8),
        ({"a" * 513: entry([2], 0, 8)}, 8),
        ({"a\n": entry([2], 0, 8)}, 8),
        ({"a\ud800": entry([2], 0, 8)}, 8),
        (GOOD | {"__metadata__": {"format": 1}}, 8),
        (GOOD | {"__metadata__": None}, 8),
        (GOOD | {"__metadata__": []}, 8),
    ],
)
def test_headers_that_lie(header: dict[str, Any], data: int, write_file: Write, tmp_path: Path) -> None:
    refused(write_file(tmp_path / "x", header, bytes(data)))


@pytest.mark.parametrize("dtype", ["I8", "U16", "BOOL", "F8_E4M3", "C64", "f32", "", "x" * 10_000])
def test_dtypes_that_no_delta_has(dtype: str, write_file: Write, tmp_path: Path) -> None:
    error = refused(write_file(tmp_path / "x", {"a": entry([2], 0, 8, dtype)}, bytes(8)), UnsupportedDelta)
    assert error.field == "a"
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe{}",
        b'{"\xff": 1}',
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"9" * 100_000 + b"}",
        b'{"a": 1, "a": 1}',
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_headers_that_are_no_json_object(raw: bytes, write_file: Write, tmp_path: Path) -> None:
    refused(write_file(tmp_path / "x", raw, bytes(8)))


def test_lengths_that_lie(write_file: Write, tmp_path: Path) -> None:
    raw = json.dumps(GOOD).encode()
    for length in (len(raw) + 9, len(raw) - 1, 0, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        refused(write_file(tmp_path / "x", raw, bytes(8), length))
    for size in range(8):
        (tmp_path / "x").write_bytes(bytes(size))
        refused(tmp_path / "x")


def test_too_long_and_too_many(write_file: Write, tmp_path: Path) -> None:
    padded = json.dumps(GOOD).encode().ljust(MAX_HEADER_BYTES + 1)
    assert str(MAX_HEADER_BYTES) in str(refused(write_file(tmp_path / "x", padded, bytes(8))))
    many = {f"{i}": entry([0], 0, 0) for i in range(MAX_TENSORS + 1)}
    path = write_file(tmp_path / "x", many)
    with pytest.raises(InvalidDelta, match="limit"):
        read_header(path, "x")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """Damage gives a DeltaError, or the tensors that the damaged file does hold; no other exception."""
    good = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(good) - 1))
        good[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)) | st.just(len(good)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(good[:cut])
    files = DeltaFiles({"x.safetensors": path})
    try:
        header = files.header("x.safetensors")
        loaded = files.tensors("x.safetensors", header.tensors)
    except DeltaError:
        return
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {
        name: info.shape for name, info in header.tensors.items()
    }


def test_json_files_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text in ('{"a": 1, "a": 2}', "[1]", '{"a": NaN}', "{" * 5, '{"a": "\\ud800"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InvalidDelta) as caught:
            DeltaFiles({"c.json": path}).json("c.json")
        assert caught.value.field == "c.json"
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert DeltaFiles({"c.json": path}).json("c.json") == {"a": "\N{GRINNING FACE}"}
    path.write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(InvalidDelta, match="larger"):
        DeltaFiles({"c.json": path}).json("c.json")


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    tensor = DeltaFiles({path.name: path}).tensors(path.name, ["a"])["a"]
    with path.open("r+b") as file:
        file.truncate(0)
    assert tensor.sum() == 1000
