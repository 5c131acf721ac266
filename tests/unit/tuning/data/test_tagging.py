"""From marked texts to a label for each word, such that serving makes the same spans of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.spans import OUTSIDE, merged, words
from server.engine.tokenizer import Tokenizer
from server.errors import DatasetInvalid
from server.tuning.data.forms import Tagged
from server.tuning.data.tagging import IGNORED, Scheme, names_of
from server.types import TextPiece
from tests.unit.tuning.data.preparing import Job

TEXT = "w5 w6 w7-w8 w9"


def span(start: int, end: int, label: str) -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


def names(job: Job, labels: list[str] | None) -> list[list[str | None]]:
    assert labels is not None
    found: list[list[str | None]] = []
    for example in job.examples():
        assert isinstance(example.label, list)
        found.append([None if n == IGNORED else labels[n] for n in example.label])
    return found


def test_spans(encoder: Job) -> None:
    rows = [{"text": TEXT, "spans": [span(12, 14, "Y"), span(3, 11, "X")]}]
    found = encoder.prepare("tag", rows)
    assert found.labels == ["B-X", "B-Y", "I-X", "I-Y", "O"]
    assert names(encoder, found.labels) == [[None, "O", "B-X", "I-X", "I-X", "I-X", "B-Y", None]]
    plain = encoder.prepare("tag", rows, labels=["O", "X", "Y"])
    assert names(encoder, plain.labels) == [[None, "O", "X", "X", "X", "X", "Y", None]]
    every = encoder.prepare("tag", rows, labels=["O", "B-X", "I-X", "E-X", "S-Y"])
    assert names(encoder, every.labels) == [[None, "O", "B-X", "I-X", "I-X", "E-X", "S-Y", None]]


def test_words(encoder: Job) -> None:
    rows = [{"tokens": TEXT.split(), "tags": ["O", "O", "B-X", "B-X"]}]
    found = encoder.prepare("tag", rows)
    assert names(encoder, found.labels) == [[None, "O", "O", "B-X", "I-X", "I-X", "B-X", None]]
    plain = encoder.prepare("tag", [{"tokens": TEXT.split(), "tags": ["DET", "NN", "NN", "O"]}])
    assert names(encoder, plain.labels) == [[None, "DET", "NN", "NN", "NN", "NN", "O", None]]


def test_a_border_inside_a_word_is_a_warning(encoder: Job) -> None:
    found = encoder.prepare("tag", [{"text": TEXT, "spans": [span(4, 5, "X")]}])
    assert names(encoder, found.labels)[0][:4] == [None, "O", "B-X", "O"]
    assert [warning.code for warning in found.warnings] == ["span_inside_word"]


def test_a_cut_text(encoder: Job) -> None:
    found = encoder.prepare(
        "tag", [{"text": " ".join(["w5"] * 20), "spans": [span(0, 59, "X")]}], max_length=8
    )
    assert names(encoder, found.labels) == [[None, "B-X", *["I-X"] * 5, None]]
    assert [warning.code for warning in found.warnings] == ["truncated"]


@pytest.mark.parametrize(
    ("row", "field", "code"),
    [
        ({"text": TEXT, "spans": {}}, "spans", "wrong_type"),
        ({"text": TEXT, "spans": [5]}, "spans[0]", "wrong_type"),
        ({"text": TEXT, "spans": [span(0, 15, "X")]}, "spans[0]", "invalid_span"),
        ({"text": TEXT, "spans": [span(3, 3, "X")]}, "spans[0]", "invalid_span"),
        ({"text": TEXT, "spans": [{"start": "0", "end": 2, "label": "X"}]}, "spans[0]", "invalid_span"),
        ({"text": TEXT, "spans": [span(0, 2, "X"), span(1, 4, "X")]}, "spans", "invalid_span"),
        ({"text": TEXT, "spans": [{"start": 0, "end": 2}]}, "spans[0].label", "missing_field"),
        ({"tokens": ["w5"], "tags": ["O", "O"]}, "tags", "length_mismatch"),
        ({"tokens": ["w5"], "tags": [3]}, "tags", "wrong_type"),
        ({"tokens": [], "tags": []}, "tokens", "empty"),
        ({"tokens": ["w5"]}, "tags", "missing_field"),
        ({"text": TEXT, "label": "X"}, None, "wrong_format"),
    ],
)
def test_bad_rows(encoder: Job, row: dict[str, Any], field: str | None, code: str) -> None:
    with pytest.raises(DatasetInvalid) as caught:
        encoder.prepare("tag", [row], labels=["O", "X"])
    assert [(found.field, found.code) for found in caught.value.rows] == [(field, code)]


def test_unknown_labels(encoder: Job) -> None:
    for row, field in (
        ({"text": TEXT, "spans": [span(0, 2, "Z")]}, "spans[0].label"),
        ({"tokens": ["w5", "w6"], "tags": ["O", "X"]}, "tags[1]"),
    ):
        with pytest.raises(DatasetInvalid) as caught:
            encoder.prepare("tag", [row], labels=["O", "B-X", "I-X"])
        assert [(found.field, found.code) for found in caught.value.rows] == [(field, "unknown_label")]


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["X", "Y", None])), min_size=1, max_size=12))
def test_serving_makes_the_same_spans(bert: Tokenizer, parts: list[tuple[int, str | None]]) -> None:
    """Perfectly learnt labels come out as the spans that went in."""
    marks, at = [], 0
    for count, label in parts:
        end = at + 3 * count - 1
        if label is not None:
            marks.append((at, end, label))
        at = end + 1
    item = Tagged(" ".join("w5" for count, _ in parts for _ in range(count)), marks, by_word=False)
    labels = sorted({OUTSIDE, *names_of(item)})
    encoded = bert.encode_pieces([[TextPiece(item.text, False)]])
    numbers, inside = Scheme(labels).numbers(item, encoded.words)
    assert not inside
    lines = [[float(n == number) for n in range(len(labels))] for number in numbers]
    served = merged(words(encoded.words, lines, labels), labels, item.text)
    assert [(s["start"], s["end"], s["label"]) for s in served] == marks
