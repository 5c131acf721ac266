"""One file's rows, read, checked and encoded, row by row."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from server.store.durable import replacing
from server.tuning.data.encode import NOTES, Encoder
from server.tuning.data.forms import Forms, Item
from server.tuning.data.problems import Problems, RowError
from server.tuning.data.repeats import Seen
from server.tuning.data.rows import rows
from server.tuning.data.tagging import IGNORED
from server.tuning.spec import Example

_ARRAY = struct.Struct(">BI")  # msgpack's head of an array: 0xdd and its length


@dataclass(frozen=True)
class EncodedFile:
    """What became of a file. ``tokens`` are those that the backbone reads in an epoch, targets included; ``learnt`` those
    that are predicted (0 but for ``generate``); ``longest`` is of tokens and target together; ``counts`` has for each
    label how often it is there (of ``classify`` and ``tag``)."""

    rows: int
    examples: int
    tokens: int
    learnt: int
    longest: int
    counts: list[int]


def items(source: Path, name: str, forms: Forms, problems: Problems) -> Iterator[tuple[int, Item]]:
    """The rows that can be read, each with its line; the others go to ``problems``, as does a file without any."""
    empty = True
    for row in rows(source):
        empty = False
        try:
            item, unused = forms.read(row)
        except RowError as error:
            problems.bad(name, row.line, error)
            continue
        for key in unused:
            problems.warn(name, "unused_field", f"the key {key} is not used", 1, [row.line])
        yield row.line, item
    if empty:
        problems.bad(name, None, RowError("empty_file", "the file has no rows"))


def encode_file(
    source: Path,
    to: Path,
    name: str,
    forms: Forms,
    encoder: Encoder,
    labels: Sequence[str],
    problems: Problems,
) -> tuple[EncodedFile, Seen]:
    """Encode ``source`` (``name`` in messages) to a msgpack list of examples at ``to``, durably; rows that cannot be
    used go to ``problems``."""
    pack = msgspec.msgpack.Encoder().encode
    seen = Seen()
    used = examples = tokens = learnt = longest = 0
    counts = Counter[int]()
    with replacing(to) as file:
        file.write(_ARRAY.pack(0xDD, 0))
        for line, item in items(source, name, forms, problems):
            try:
                encoder.check(item)
                found = encoder.encode(item)
            except RowError as error:
                problems.bad(name, line, error)
                continue
            used += 1
            seen.add(line, item)
            for note in found.notes:
                problems.warn(name, note, NOTES[note], 1, [line])
            for example in found.examples:
                file.write(pack(example))
                size = len(example.tokens) + len(example.target)
                examples += 1
                tokens += size
                longest = max(longest, size)
                learnt += len(example.target) + sum(end - start for start, end in example.learn)
                counts.update(_labels(example))
        file.seek(0)
        file.write(_ARRAY.pack(0xDD, examples))
    numbers = [counts[n] for n in range(len(labels))]
    return EncodedFile(used, examples, tokens, learnt, longest, numbers), seen


def _labels(example: Example) -> Sequence[int]:
    if isinstance(example.label, list):
        return [label for label in example.label if label != IGNORED]
    return [example.label] if isinstance(example.label, int) else []
