"""A stand-in for ``server.tuning.data.prepare``: rows of ``text`` and ``label``, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import InvalidRequest


@dataclass(frozen=True)
class Encoded:
    examples: int
    tokens: int
    longest: int


@dataclass(frozen=True)
class Prepared:
    labels: list[str] | None
    training: Encoded
    validation: Encoded | None
    warnings: list[Any]


def prepare(
    train: Path, valid: Path | None, *, labels: list[str] | None, folder: Path, **rest: Any
) -> Prepared:
    """Check and encode."""
    training, found = _read(train, "training_file")
    validation = None if valid is None else _read(valid, "validation_file")[0]
    (folder / "train.msgpack").write_bytes(b"")
    if rest["task"] == "generate":
        found = []
    return Prepared(labels or sorted(set(found)) or None, training, validation, [])


def _read(path: Path, param: str) -> tuple[Encoded, list[str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        if set(row) != {"text", "label"}:
            raise InvalidRequest(f"line {number}: a row has text and label", param=param)
    sizes = [len(row["text"]) for row in rows]
    return Encoded(len(rows), sum(sizes), max(sizes)), [row["label"] for row in rows]
