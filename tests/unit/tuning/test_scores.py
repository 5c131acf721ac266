"""Scores against values recorded from scikit-learn 1.9 and scipy 1.17, against plain definitions, and what always holds."""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tuning import scores

CLASSES = [  # wanted, found, accuracy_score, f1_score(average="macro"), matthews_corrcoef
    ([1, 0, 1, 0, 0, 0, 1], [1, 0, 1, 0, 0, 0, 1], 1.0, 1.0, 1.0),
    (
        [0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1],
        [0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1],
        0.7,
        0.7,
        0.4141414141,
    ),
    (
        [1, 1, 1, 1, 0, 0, 0, 2, 1, 2, 1, 1, 2, 0, 2, 0, 0, 2, 1, 0],
        [0, 1, 0, 1, 0, 1, 2, 2, 1, 2, 0, 1, 0, 0, 2, 0, 1, 2, 1, 0],
        0.65,
        0.6666666667,
        0.4694656489,
    ),
    ([1, 0, 0, 0, 4, 1, 3], [1, 1, 0, 0, 4, 2, 3], 0.7142857143, 0.66, 0.6398771167),
]
NUMBERS = [  # wanted, found, pearsonr, spearmanr
    (
        [0.24, -0.46, 0.24, 1.39, 1.24, -0.42, -2.18],
        [1.9, 1.4, 0.8, 1.3, 1.8, 0.2, -1.6],
        0.8387786375,
        0.5045249791,
    ),
    (
        [0.57, 0.0, 0.76, 0.57, 2.01, 0.32, -0.43],
        [0.2, -0.0, 1.7, 0.2, 2.4, 2.2, -3.0],
        0.7460136836,
        0.7818181818,
    ),
    (
        [-0.46, 0.26, 0.79, -0.5, -1.28, 0.34, 0.86],
        [-1.1, 1.3, 0.2, -1.7, -1.5, 1.4, 1.0],
        0.8059422118,
        0.6785714286,
    ),
]

rows_of_classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
rows_of_numbers = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=30)
texts = st.lists(st.sampled_from("abc"), max_size=12)


@pytest.mark.parametrize(("wanted", "found", "accuracy", "f1", "matthews"), CLASSES)
def test_of_classes(wanted: list[int], found: list[int], accuracy: float, f1: float, matthews: float) -> None:
    assert scores.accuracy(wanted, found) == pytest.approx(accuracy)
    assert scores.macro_f1(wanted, found) == pytest.approx(f1)
    assert scores.matthews(wanted, found) == pytest.approx(matthews)


@pytest.mark.parametrize(("wanted", "found", "pearson", "spearman"), NUMBERS)
def test_of_numbers(wanted: list[float], found: list[float], pearson: float, spearman: float) -> None:
    assert scores.pearson(wanted, found) == pytest.approx(pearson)
    assert scores.spearman(wanted, found) == pytest.approx(spearman)


def test_of_texts() -> None:
    assert scores.exact_match(["a b", "c"], ["a b", "d"]) == 0.5
    # Lin 2004, section 3.1: "police killed the gunman" against two candidates.
    wanted = ["police", "killed", "the", "gunman"]
    assert scores.rouge_l([wanted], [["police", "kill", "the", "gunman"]]) == 0.75
    assert scores.rouge_l([wanted], [["the", "gunman", "kill", "police"]]) == 0.5
    assert scores.rouge_l([wanted, wanted], [wanted, []]) == 0.5
    assert scores.perplexity(math.log(20)) == pytest.approx(20)
    assert math.isfinite(scores.perplexity(1e6))


def test_of_spans() -> None:
    labels = ["B-X", "I-X", "B-Y", "I-Y", "O"]
    wanted = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"]]
    found = [["B-X", "I-X", "O", "B-X"], ["O", "B-X"]]
    assert scores.span_f1(wanted, wanted, labels) == 1
    assert scores.span_f1(wanted, found, labels) == pytest.approx(2 / 3)
    assert scores.span_f1([["X", "X", "O"]], [["X", "O", "X"]], ["X", "O"]) == 0
    with pytest.raises(ValueError, match="2 labels wanted and 1 found"):
        scores.span_f1([["O", "O"]], [["O"]], labels)


def test_nothing_to_compare_is_0() -> None:
    for score in (scores.accuracy, scores.macro_f1, scores.matthews, scores.pearson, scores.spearman):
        assert score([], []) == 0
    assert scores.matthews([1, 1], [1, 1]) == 0
    assert scores.pearson([1, 1], [1, 2]) == 0
    assert scores.rouge_l([[]], [[]]) == 0
    with pytest.raises(ValueError, match="shorter"):
        scores.accuracy([1, 2], [1])


@given(rows_of_classes)
def test_classes_always(rows: list[tuple[int, int]]) -> None:
    """Within bounds, the same for the rows in another order and with the classes renamed."""
    wanted, found = zip(*rows, strict=True)
    back = [f"class {n}" for n in reversed(wanted)], [f"class {n}" for n in reversed(found)]
    for score, least in ((scores.accuracy, 0), (scores.macro_f1, 0), (scores.matthews, -1)):
        value = score(wanted, found)
        assert least - 1e-12 <= value <= 1 + 1e-12
        assert value == pytest.approx(score(*back))
    assert scores.accuracy(wanted, wanted) == scores.macro_f1(wanted, wanted) == 1


@given(rows_of_numbers)
def test_numbers_always(rows: list[tuple[float, float]]) -> None:
    wanted, found = zip(*rows, strict=True)
    assert -1 <= scores.pearson(wanted, found) <= 1
    # Ranks do not see what keeps an order.
    assert scores.spearman(wanted, found) == scores.spearman([8 * x for x in wanted], found)
    assert scores.spearman(wanted, wanted) in (0, pytest.approx(1))


@given(texts, texts)
def test_rouge_by_definition(one: list[str], other: list[str]) -> None:
    @cache
    def common(i: int, j: int) -> int:
        if not i or not j:
            return 0
        if one[i - 1] == other[j - 1]:
            return common(i - 1, j - 1) + 1
        return max(common(i - 1, j), common(i, j - 1))

    total = len(one) + len(other)
    expected = 2 * common(len(one), len(other)) / total if total else 0
    assert scores.rouge_l([one], [other]) == pytest.approx(expected)
