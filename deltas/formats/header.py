"""Strict reading of a safetensors header: names, dtypes and shapes, without a byte of tensor data.

A header is client input. It is bounded before it is parsed, and every offset is checked against shape, dtype
and the file's size, so that whatever is loaded later is as large as the file and no larger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltas.errors import InvalidDelta, UnsupportedDelta

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8
MAX_NAME = 512
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors by name, in the file's order, and the file's own string metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def shown(name: object, limit: int = 200) -> str:
    """A client's string, quoted for a message: escaped, cut to ``limit`` characters."""
    text = ascii(name)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_header(path: Path, name: str) -> Header:
    """Parse and check the header of the safetensors file at ``path``, called ``name`` in messages.

    Raises :class:`InvalidDelta` (``field`` is the file's or the tensor's name) or, for a dtype that no delta
    has, :class:`UnsupportedDelta`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise InvalidDelta(f"{name} is too short to be a safetensors file", field=name)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or length > size - _LENGTH_BYTES:
            raise InvalidDelta(
                f"{name}: header of {length} bytes; the limit is {MAX_HEADER_BYTES}, and the file's size",
                field=name,
            )
        raw = file.read(length)
    entries = parse_json(raw, name)
    metadata = _metadata(entries.pop(_METADATA, {}), name)
    if len(entries) > MAX_TENSORS:
        raise InvalidDelta(f"{name} has {len(entries)} tensors, the limit is {MAX_TENSORS}", field=name)
    return Header(_tensors(entries, size - _LENGTH_BYTES - length, name), metadata)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no duplicate keys, no NaN or Infinity, no half surrogates."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InvalidDelta(f"{name}: duplicate key {shown(key)}", field=name)
            found[key] = value
        return found

    def refuse(literal: str) -> None:
        raise InvalidDelta(f"{name}: {literal} is not JSON", field=name)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if b"\\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # escapes may hide what UTF-8 cannot hold
    except InvalidDelta:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidDelta(f"{name} is not valid JSON: {type(error).__name__}", field=name) from None
    if not isinstance(value, dict):
        raise InvalidDelta(f"{name} must hold a JSON object", field=name)
    return value


def _metadata(value: object, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InvalidDelta(f"{name}: {_METADATA} must map strings to strings", field=name)
    return dict(value)


def _tensors(entries: dict[str, Any], data_bytes: int, file: str) -> dict[str, TensorInfo]:
    """Check every entry, and that together they cover the data exactly, without gaps or overlaps."""
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InvalidDelta(
                f"{file}: a tensor's name must be 1 to {MAX_NAME} printable characters, not {shown(name)}",
                field=file,
            )
        info, start, end = _entry(name, entry)
        tensors[name] = info
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position or end > data_bytes:
            raise InvalidDelta(
                f"{shown(name)}: data offsets [{start}, {end}] leave a gap, overlap or leave the file",
                field=name,
            )
        position = end
    if position != data_bytes:
        raise InvalidDelta(f"{file} has {data_bytes - position} bytes that belong to no tensor", field=file)
    return tensors


def _entry(name: str, entry: object) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidDelta(f"{shown(name)}: expected dtype, shape and data_offsets", field=name)
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise UnsupportedDelta(
            f"{shown(name)} has dtype {shown(entry['dtype'])}; accepted: {', '.join(_DTYPES)}", field=name
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise InvalidDelta(f"{shown(name)}: not a shape: {shown(shape)}", field=name)
    if not _naturals(offsets) or len(offsets) != 2:
        raise InvalidDelta(f"{shown(name)}: not a pair of offsets: {shown(offsets)}", field=name)
    nbytes = dtype.itemsize
    for extent in shape:
        nbytes *= extent
    start, end = offsets
    if end - start != nbytes:
        raise InvalidDelta(
            f"{shown(name)}: shape {shown(shape)} needs {nbytes} bytes, its offsets hold {end - start}",
            field=name,
        )
    return TensorInfo(dtype, tuple(shape)), start, end


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
