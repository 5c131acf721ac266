"""What a validation set is judged by: every task's scores from what passes give, rows out of order, several passes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deltas.bank import PackedDelta
from server.tuning import batches, evaluation
from server.tuning.forward import Generated, Output, Part, Passes, Scored
from server.tuning.scores import METRICS
from server.tuning.spec import Example, JobSpec, Task

DELTA = PackedDelta(torch.empty(0), {})


class Given:
    """A stand-in for the passes: what the head gives is what a row's tokens say."""

    backbone = SimpleNamespace(spec=SimpleNamespace(kind="encoder"))

    def __init__(self, task: Task, classes: int) -> None:
        self.task, self.classes, self.passes = task, classes, 0

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        self.passes += 1
        (part,) = parts
        said = [example.tokens for example in part.examples]
        if self.task == "regress":
            return [Scored(torch.tensor([[float(tokens[0])] for tokens in said]))]
        if self.task == "generate":
            right = torch.tensor([token for tokens in said for token in tokens], dtype=torch.bool)
            counts = [len(tokens) for tokens in said]
            return [Generated(torch.ones(len(right)), right.long(), right, counts)]
        numbers = [token for tokens in said for token in (tokens if self.task == "tag" else tokens[:1])]
        return [Scored(torch.nn.functional.one_hot(torch.tensor(numbers), self.classes).float() * 9)]


def scores(task: Task, examples: list[Example], labels: list[str] | None = None) -> dict[str, float]:
    spec = JobSpec(id="j", tenant="t", name="n", task=task, methods=[], labels=labels)
    given = cast(Passes, cast(Any, Given(task, len(labels or ()))))
    return evaluation.evaluate(given, spec, examples, DELTA)


def test_classes() -> None:
    rows = [Example([0], label=0), Example([1], label=1), Example([1], label=0), Example([2], label=2)]
    found = scores("classify", rows, ["a", "b", "c"])
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["matthews"] == pytest.approx(0.7, abs=0.1)
    assert set(found) == set(METRICS["classify"])


def test_values() -> None:
    rows = [Example([n], label=2.0 * n + 1) for n in (3, 1, 4, 1, 5)]
    found = scores("regress", rows)
    assert found["pearson"] == pytest.approx(1)
    assert found["spearman"] == pytest.approx(1)


def test_tags_count_where_a_token_has_one() -> None:
    labels = ["O", "B-X", "I-X"]
    rows = [Example([0, 1, 2, 0], label=[-100, 1, 2, 0]), Example([0, 1], label=[0, 0])]
    found = scores("tag", rows, labels)
    assert found["accuracy"] == pytest.approx(4 / 5)
    assert found["span_f1"] == pytest.approx(2 / 3)  # one right, one too many


def test_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "STEP_TOKENS", 3)
    rows = [Example([1, 1], learn=[(0, 2)]), Example([1, 0, 1], learn=[(0, 3)]), Example([1], learn=[(0, 1)])]
    monkeypatch.setattr(evaluation.losses, "total", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(evaluation.losses, "weight", lambda *_: 2.0)
    found = scores("generate", rows)
    assert found["token_accuracy"] == pytest.approx(5 / 6)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["perplexity"] == pytest.approx(torch.tensor(0.5).exp().item())
