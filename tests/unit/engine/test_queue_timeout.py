"""Rows that wait too long for their first place in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.batching import Batcher, EncodeJob
from server.types import EncoderInput, Want
from tests.tiny import random_delta
from tests.unit.engine.running import Harness, harnesses
from tests.unit.engine.scheduling import Engine, make, row


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_has_waited_too_long_ends_and_nothing_else() -> None:
    clock = Clock()
    scheduler = make(max_rows=1, kv_tokens=64, queue_timeout=5.0, clock=clock)
    engine = Engine(scheduler)
    running = row(4, 50, arrived=clock.now)
    engine.add(running)
    engine.step()
    clock.now += 1
    early = row(4, arrived=clock.now, priority=9)
    engine.add(early)
    clock.now += 3
    late = row(4, arrived=clock.now, tenant="b")
    engine.add(late)
    assert scheduler.next_expiry() == pytest.approx(2.0)
    assert scheduler.expire() == []
    clock.now += 2
    assert scheduler.expire() == [early]
    scheduler.check_integrity()
    assert scheduler.expire() == []
    assert scheduler.next_expiry() == pytest.approx(3.0)
    assert scheduler.rows_running == scheduler.rows_waiting == 1
    clock.now += 3
    assert scheduler.expire() == [late]
    assert scheduler.next_expiry() is None
    assert running.slot is not None


def test_preempted_rows_never_time_out() -> None:
    clock = Clock()
    scheduler = make(max_rows=2, slot_tokens=120, kv_tokens=120, queue_timeout=5.0, clock=clock)
    engine = Engine(scheduler)
    for _ in range(2):
        engine.add(row(10, 80, arrived=clock.now))
    while not engine.step().preempted:
        pass
    clock.now += 1000
    assert scheduler.expire() == []
    assert scheduler.next_expiry() is None
    engine.drain(1000)


def test_without_a_timeout_nothing_expires() -> None:
    scheduler = make(clock=lambda: 1e12)
    scheduler.add(row(4))
    assert scheduler.expire() == []
    assert scheduler.next_expiry() is None


def test_rows_for_an_encoder() -> None:
    clock = Clock()
    batcher = Batcher(max_rows=1, step_tokens=8, max_waiting=9, queue_timeout=2.0, clock=clock)
    for number in range(3):
        job = EncodeJob(number, "t", EncoderInput([1, 2]), None, Want("embedding"), clock.now)
        batcher.add(job)
        clock.now += 1
    assert [job.id for job in batcher.next(lambda _: 0)] == [0]
    assert [job.id for job in batcher.expire()] == [1]
    assert batcher.next_expiry() == pytest.approx(1.0)
    batcher.check_integrity()


@settings(max_examples=60, deadline=None)
@given(
    timeout=st.integers(1, 20),
    events=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(-2, 2)), max_size=40),
)
def test_no_row_is_found_waiting_beyond_the_timeout(
    timeout: int, events: list[tuple[int, bool, int]]
) -> None:
    clock = Clock()
    engine = Engine(make(max_rows=1, kv_tokens=64, queue_timeout=timeout, clock=clock))
    for pause, steps, priority in events:
        engine.add(row(4, 6, arrived=clock.now, priority=priority))
        clock.now += pause
        for seq in engine.scheduler.expire():
            assert clock.now - seq.arrived >= timeout
            assert seq.started is None
            engine.end(seq, "expired")
        assert all(clock.now - seq.arrived < timeout for seq in engine.scheduler.waiting())
        engine.scheduler.check_integrity()
        if steps:
            engine.step()
    engine.drain(40 * 12)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    with harnesses(tmp_path / "tiny") as made:
        yield made


def test_the_engine_answers_them_also_when_it_has_nothing_to_run(start: Callable[..., Harness]) -> None:
    """A row waits for a delta that no loader ever reads: no message and no step comes that could tell."""
    harness = start(queue_timeout_seconds=0.2)
    ref = harness.save(random_delta(harness.engine.runner.backbone.spec, "lora", 1))
    harness.engine.residency._loaders.load = lambda ref: None  # type: ignore[method-assign]
    harness.submit(1, [3, 4, 5], ref)
    harness.wait(1)
    assert harness.ends[1] == "queue_timeout"
    assert "--queue-timeout-seconds" in harness.messages[1]
    harness.submit(2, [3, 4, 5])
    harness.wait(2)
    assert harness.ends[2] == "length"
    harness.engine.scheduler.check_integrity()
