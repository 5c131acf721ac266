"""Whole files: every bad row is reported, labels, warnings, what is left on disk."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from server.errors import DatasetInvalid, InvalidRequest, UnsupportedTask
from server.tuning.data.problems import SHOWN
from tests.unit.tuning.data.preparing import Job

GOOD = [{"text": "w5 w6", "label": "b"}, {"text": "w7", "label": "a"}]


def refused(job: Job, *arguments: Any, **options: Any) -> DatasetInvalid:
    with pytest.raises(DatasetInvalid) as caught:
        job.prepare(*arguments, **options)
    assert not (job.folder / "job" / "train.msgpack").exists()
    return caught.value


def bad(error: DatasetInvalid) -> list[tuple[int | None, str | None, str]]:
    return [(row.line, row.field, row.code) for row in error.rows]


def test_labels_are_sorted(encoder: Job) -> None:
    found = encoder.prepare("classify", [*GOOD, {"text": "w8", "label": 3}], GOOD[:1])
    assert found.labels == ["3", "a", "b"]
    assert [example.label for example in encoder.examples()] == [2, 1, 0]
    assert [example.label for example in encoder.examples("valid.msgpack")] == [2]
    assert found.training.counts == [1, 1, 1]
    assert found.training.rows == found.training.examples == 3
    assert found.training.tokens == 4 + 3 + 3
    assert found.training.longest == 4
    assert not (encoder.folder / "job" / "problems.jsonl").exists()
    assert encoder.prepare("classify", GOOD, labels=["b", "c", "a"]).labels == ["b", "c", "a"]
    assert [example.label for example in encoder.examples()] == [0, 2]


def test_every_bad_row_of_both_files(encoder: Job) -> None:
    train = [
        *GOOD,
        {"text": "", "label": "a"},
        {"label": "a"},
        {"text": 5, "label": "a"},
        {"text": "w5"},
        {"text": "w5", "label": None},
        {"text": "w5", "label": 0.5},
        {"text": "w5", "label": True},
        {"text": "w5", "label": " "},
        {"text": "w5", "label": "x" * 257},
        {"prompt": "w5", "completion": "w6"},
        {"messages": []},
        {"id": 5},
    ]
    error = refused(encoder, "classify", train, [{"text": "w5", "label": "c"}, GOOD[0]])
    assert error.param == "training_file"
    assert error.code == "invalid_dataset"
    assert bad(error) == [
        (3, "text", "empty"),
        (4, "text", "missing_field"),
        (5, "text", "wrong_type"),
        (6, "label", "missing_field"),
        (7, "label", "missing_field"),
        (8, "label", "wrong_type"),
        (9, "label", "wrong_type"),
        (10, "label", "invalid_label"),
        (11, "label", "invalid_label"),
        (12, None, "wrong_format"),
        (13, None, "wrong_format"),
        (14, "text", "missing_field"),
        (1, "label", "unknown_label"),
    ]
    assert error.rows[-1].file == "validation_file"
    assert error.report is not None
    report = [json.loads(line) for line in error.report.read_text().splitlines()]
    assert report == [row._asdict() for row in error.rows]
    body = error.body()["error"]
    assert body["bad_rows"] == 13
    assert body["rows"][0] == report[0]
    assert "line 3: 'text' is empty" in body["message"]
    only = refused(encoder, "classify", GOOD, [{"text": "w5", "label": "c"}])
    assert only.param == "validation_file"
    assert "not in the training file" in only.rows[0].message


def test_the_answer_is_capped_and_the_report_is_not(encoder: Job) -> None:
    error = refused(encoder, "classify", [*GOOD, *[{"text": ""}] * 1000])
    assert (len(error.rows), error.count) == (SHOWN, 1000)
    assert error.report is not None
    assert len(error.report.read_text().splitlines()) == 1000


@pytest.mark.parametrize(
    ("task", "train", "options", "found"),
    [
        ("classify", b"", {}, [(None, None, "empty_file")]),
        ("classify", b"text,label\n", {}, [(None, None, "empty_file")]),
        ("classify", GOOD[:1], {}, [(None, "label", "one_label")]),
        ("classify", GOOD, {"labels": ["b", "c"]}, [(2, "label", "unknown_label")]),
        ("regress", [{"text": "w5", "label": "x"}], {}, [(1, "label", "wrong_type")]),
        ("regress", b'{"text": "w5", "label": 1e999}', {}, [(1, None, "invalid_json")]),
        ("regress", b"text,label\nw5,nan\n", {}, [(2, "label", "wrong_type")]),
        (
            "classify",
            [{"text": f"w{n}", "label": str(n)} for n in range(1026)],
            {},
            [(1025, "label", "too_many_labels"), (1026, "label", "unknown_label")],
        ),
    ],
)
def test_files_that_cannot_be_learnt(
    encoder: Job, task: str, train: Any, options: dict[str, Any], found: list[Any]
) -> None:
    assert bad(refused(encoder, task, train, **options)) == found


def test_formats_do_not_mix(decoder: Job) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"text": "a", "label": "b"}, {"prompt": "a"}]
    error = refused(decoder, "generate", rows)
    assert bad(error) == [(2, None, "mixed_formats"), (3, "completion", "missing_field")]
    assert "began with prompt and completion at line 1" in error.rows[0].message


def test_warnings(encoder: Job) -> None:
    rows = [
        *GOOD,
        GOOD[0],
        {"text": "w5 w6", "label": "a"},
        {"text": " ".join(["w5"] * 80), "label": "a", "id": 7},
    ]
    found = encoder.prepare("classify", rows, [GOOD[1]], labels=["a", "b", "c"])
    assert [(w.file, w.code, w.count, w.lines) for w in found.warnings] == [
        ("training_file", "unused_field", 1, [5]),
        ("training_file", "truncated", 1, [5]),
        ("training_file", "duplicate", 1, [3]),
        ("training_file", "contradiction", 1, [4]),
        ("validation_file", "in_training_file", 1, [1]),
        ("training_file", "unused_label", 1, []),
    ]
    assert encoder.prepare("classify", GOOD).warnings == []


def test_repeats_are_those_that_a_dictionary_finds(encoder: Job) -> None:
    draw = random.Random(3)
    rows = [{"text": f"w{draw.randrange(5, 12)}", "label": draw.choice("ab")} for _ in range(60)]
    counts = {w.code: w.count for w in encoder.prepare("classify", rows).warnings}
    wholes = {(row["text"], row["label"]) for row in rows}
    assert counts["duplicate"] == len(rows) - len(wholes)
    assert counts["contradiction"] == len(wholes) - len({row["text"] for row in rows})


@pytest.mark.parametrize(
    ("task", "options", "param"),
    [
        ("classify", {"labels": ["a"]}, "labels"),
        ("classify", {"labels": ["a", "a"]}, "labels"),
        ("classify", {"labels": ["a", ""]}, "labels"),
        ("regress", {"labels": ["a", "b"]}, "labels"),
        ("tag", {"labels": ["a", "b"]}, "labels"),
        ("tag", {"template": "{text}."}, "template"),
        ("classify", {"template": [{"role": "user", "content": "{text}"}]}, "template"),
        ("classify", {"max_length": 4}, "max_length"),
    ],
)
def test_what_does_not_fit_is_said_before_files_are_read(
    encoder: Job, task: str, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encoder.prepare(task, b"\xff", **options)
    assert caught.value.param == param


def test_kinds(encoder: Job, decoder: Job) -> None:
    with pytest.raises(UnsupportedTask, match="generates no text"):
        encoder.prepare("generate", GOOD)
    with pytest.raises(InvalidRequest, match="takes no pair"):
        decoder.prepare("generate", GOOD, template=["{text}", "{b}"])
