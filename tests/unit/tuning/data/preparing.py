"""What tests of datasets share: tiny backbones' tokenizers, files, and ``prepare`` on them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from server.engine.templates import Stored, Template
from server.engine.tokenizer import Tokenizer
from server.tuning.data import TRAIN_FILE, Prepared, prepare
from server.tuning.spec import Example

Rows = bytes | Iterable[Any]


class Job:
    """A folder and a tokenizer; files are bytes, or rows that become JSONL."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, kind: Any) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.kind = kind

    def prepare(
        self, task: Any, train: Rows, valid: Rows | None = None, *, template: Stored = None, **given: Any
    ) -> Prepared:
        files = [
            self.write(name, rows) for name, rows in (("train", train), ("valid", valid)) if rows is not None
        ]
        options = {"labels": None, "max_length": 64, "positions": 256} | given
        return prepare(
            files[0],
            files[1] if len(files) == 2 else None,
            kind=self.kind,
            task=task,
            template=None if template is None else Template.of(template),
            tokenizer=self.tokenizer,
            folder=self.folder / "job",
            **options,
        )

    def write(self, name: str, rows: Rows) -> Path:
        path = self.folder / name
        path.write_bytes(rows if isinstance(rows, bytes) else b"".join(_line(row) for row in rows))
        return path

    def examples(self, name: str = TRAIN_FILE) -> list[Example]:
        """What was written."""
        return msgspec.msgpack.decode((self.folder / "job" / name).read_bytes(), type=list[Example])


def _line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"
