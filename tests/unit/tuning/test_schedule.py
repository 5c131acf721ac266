"""How the rate goes, and which rows a step reads."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from server.tuning.schedule import Order, factor
from server.tuning.spec import JobSpec, Schedule

STEPS = 20


def rates(schedule: Schedule, warmup: float, steps: int = STEPS) -> list[float]:
    spec = JobSpec(
        id="j", tenant="t", name="n", task="generate", methods=[], schedule=schedule, warmup=warmup
    )
    return [factor(spec, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_warms_up(schedule: Schedule) -> None:
    """Over 4 of 20 steps, to the peak at the next."""
    assert rates(schedule, 0.2)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(schedule, 0.0)[0] == 1.0
    assert rates(schedule, 0.06, 1)[0] > 0


def test_it_falls() -> None:
    assert rates("constant", 0.2)[4:] == [1.0] * 16
    assert rates("linear", 0.2)[4:] == pytest.approx([1 - n / 16 for n in range(16)])
    assert rates("cosine", 0.2)[4:] == pytest.approx(
        [(1 + math.cos(math.pi * n / 16)) / 2 for n in range(16)]
    )


def test_every_epoch_reads_every_row_once() -> None:
    order = Order(rows=23, batch_size=3, accumulation=2, seed=5)
    assert order.steps_an_epoch == 4
    epochs = []
    for epoch in range(2):
        steps = [order.step(epoch * 4 + n) for n in range(4)]
        assert [[len(batch) for batch in step] for step in steps] == [[3, 3]] * 3 + [[3, 2]]
        epochs.append([row for step in steps for batch in step for row in batch])
        assert Counter(epochs[-1]) == Counter(range(23))
    assert epochs[0] != epochs[1]
    assert order.step(5) == Order(23, 3, 2, 5).step(5)
    assert order.step(0) != Order(23, 3, 2, 6).step(0)
