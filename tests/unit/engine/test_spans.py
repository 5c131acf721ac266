"""From labels of tokens to spans: cases checked by hand, and what holds for all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.spans import Word, merged, words

TEXT = "aa bb cc dd ee ff"


def spans(labels: list[str], known: list[str] | None = None) -> list[tuple[str, str]]:
    """(label, text) of the spans over the words of TEXT, the n-th of which has the n-th label."""
    found = [Word(3 * n, 3 * n + 2, label, 1.0) for n, label in enumerate(labels)]
    return [(s["label"], TEXT[s["start"] : s["end"]]) for s in merged(found, known or labels, TEXT)]


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["O", "O"], []),
        (["B-x", "I-x", "O", "B-x"], [("x", "aa bb"), ("x", "dd")]),
        (["B-x", "B-x"], [("x", "aa"), ("x", "bb")]),
        (["B-x", "I-y"], [("x", "aa"), ("y", "bb")]),
        (["I-x", "I-x", "O", "I-x"], [("x", "aa bb"), ("x", "dd")]),
        (["O", "I-x", "B-x"], [("x", "bb"), ("x", "cc")]),
        (["B-x", "I-x", "E-x", "I-x"], [("x", "aa bb cc"), ("x", "dd")]),
        (["B-x", "L-x", "U-x", "U-x"], [("x", "aa bb"), ("x", "cc"), ("x", "dd")]),
        (["S-x", "I-x", "S-y"], [("x", "aa"), ("x", "bb"), ("y", "cc")]),
        (["E-x", "E-x"], [("x", "aa"), ("x", "bb")]),
        (["B-a-b", "I-a-b"], [("a-b", "aa bb")]),
        # without a prefix on every label there are none: consecutive words of one label are one span
        (["x", "x", "y", "O", "y"], [("x", "aa bb"), ("y", "cc"), ("y", "ee")]),
        (["B-x", "B-x", "y"], [("B-x", "aa bb"), ("y", "cc")]),
    ],
)
def test_by_hand(labels: list[str], wanted: list[tuple[str, str]]) -> None:
    assert spans(labels) == wanted


def test_prefixes_are_a_matter_of_all_labels() -> None:
    assert spans(["B-x", "B-x"], ["O", "B-x", "plain"]) == [("B-x", "aa bb")]
    assert spans(["B-x", "B-x"], ["O", "B-x", "I-x"]) == [("x", "aa"), ("x", "bb")]


def test_a_word_has_the_label_of_its_first_token() -> None:
    tokens = [None, (0, 0, 2), (0, 2, 5), (1, 6, 8), None]
    lines = [[], [0.1, 0.7, 0.2], [0.9, 0.05, 0.05], [0.6, 0.3, 0.1], []]
    assert [*words(tokens, lines, ["O", "x", "y"])] == [Word(0, 5, "x", 0.7), Word(6, 8, "O", 0.6)]


def test_scores_are_means_and_spaces_before_a_word_are_cut() -> None:
    found = [Word(2, 5, "x", 0.5), Word(5, 8, "x", 1.0)]
    assert merged(found, ["x"], "aa bb cc") == [{"start": 3, "end": 8, "label": "x", "score": 0.75}]


SCHEMES = [
    ["O", "B-x", "I-x", "B-y", "I-y"],
    ["O", *(f"{p}-{t}" for p in "BILU" for t in "xy")],
    ["O", "x", "y"],
]


@given(
    st.sampled_from(SCHEMES).flatmap(
        lambda k: st.tuples(st.just(k), st.lists(st.sampled_from(k), max_size=6))
    )
)
def test_spans_cover_the_labelled_words_once_and_in_order(case: tuple[list[str], list[str]]) -> None:
    known, labels = case
    found = [Word(3 * n, 3 * n + 2, label, (n + 1) / 10) for n, label in enumerate(labels)]
    result: list[dict[str, Any]] = merged(found, known, TEXT)
    covered: list[int] = []
    for span in result:
        inside = [n for n, word in enumerate(found) if span["start"] <= word.start < span["end"]]
        assert inside == [*range(inside[0], inside[-1] + 1)]
        assert {labels[n].rpartition("-")[2] for n in inside} == {span["label"]}
        assert span["score"] == pytest.approx(sum((n + 1) / 10 for n in inside) / len(inside))
        covered += inside
    assert covered == [n for n, label in enumerate(labels) if label != "O"]


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from("xy")), max_size=3))
def test_what_is_written_in_bio_is_read_again(wanted: list[tuple[int, str]]) -> None:
    labels = [f"{'B' if n == 0 else 'I'}-{kind}" for length, kind in wanted for n in range(length)][:6]
    begins = sum(label.startswith("B") for label in labels)
    assert len(spans(labels, SCHEMES[0])) == begins
