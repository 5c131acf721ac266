"""Rows of encoder-decoders in the schedule: a source is read whole, in the step in which its row begins."""

from __future__ import annotations

import random
from itertools import count

import pytest

from server.engine.plan import Plan
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import ContextTooLong, InvalidRequest
from server.types import SamplingParams
from tests.unit.engine.scheduling import make, resident

_ids = count()


def row(source: int, prompt: int = 1, max_tokens: int = 4, tenant: str = "a") -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(next(_ids), tenant, [0] * prompt, sampling, source=[7] * source)


def scheduler(**sizes: int) -> Scheduler:
    return make(**({"source_tokens": 64, "kv_tokens": 512} | sizes))


def step(engine: Scheduler) -> Plan:
    """One step as the step loop settles it."""
    plan = engine.next(resident)
    for planned in plan.rows:
        seq = planned.seq
        assert 1 <= planned.count <= seq.uncomputed
        assert planned.start == seq.computed
        seq.advance(planned.count, 7 if planned.samples else None)
        if not seq.remaining and not (seq.uncomputed and not planned.samples):
            engine.finish(seq)
    engine.check_integrity()
    return plan


def began(plan: Plan) -> list[int]:
    return [len(planned.seq.source) for planned in plan.rows if planned.start == 0]


def test_sources_share_a_steps_budget_in_order() -> None:
    engine = scheduler(prefill_tokens=32)
    for length in (10, 12, 20, 3):
        engine.add(row(length))
    assert began(step(engine)) == [10, 12]  # with a token each; 3 more would fit, and would pass 20
    assert began(step(engine)) == [20, 3]


def test_one_that_is_longer_than_the_budget_goes_alone() -> None:
    engine = scheduler(prefill_tokens=16)
    for length in (5, 64, 5):
        engine.add(row(length))
    assert [began(step(engine)) for _ in range(3)] == [[5], [64], [5]]


def test_a_long_decoder_prompt_gets_on_while_sources_keep_coming() -> None:
    engine = scheduler(prefill_tokens=16, max_rows=3)
    scored = row(20, prompt=60, max_tokens=1)
    engine.add(scored)
    for _ in range(12):
        engine.add(row(15, max_tokens=1))
        step(engine)
    assert scored.computed == 60


def test_sources_are_checked_counted_and_charged() -> None:
    engine = scheduler()
    with pytest.raises(InvalidRequest, match="empty"):
        engine.add(row(0))
    with pytest.raises(ContextTooLong, match="65 tokens"):
        engine.add(row(65))
    with pytest.raises(ContextTooLong, match="at most 0"):
        make().add(row(1))
    with pytest.raises(ValueError, match="a source of 64"):
        make(source_tokens=64, kv_tokens=100)
    engine.add(row(30))
    engine.next(resident)
    assert engine.kv_tokens_used == 30 + 1


def test_a_tenant_with_long_sources_waits_for_one_with_short_ones() -> None:
    engine = scheduler(max_rows=1, prefill_tokens=64)
    for _ in range(4):
        engine.add(row(60, tenant="long", max_tokens=1))
        engine.add(row(5, tenant="short", max_tokens=1))
    assert [length for _ in range(5) for length in began(step(engine))] == [60, 5, 5, 5, 5]


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic(seed: int) -> None:
    rng = random.Random(seed)
    engine = scheduler(prefill_tokens=rng.choice([16, 40]), max_rows=rng.randint(1, 6))
    rows = [
        row(rng.randint(1, 64), rng.randint(1, 30), rng.randint(0, 6), rng.choice("abc")) for _ in range(40)
    ]
    waiting = list(rows)
    for _ in range(2000):
        for seq in waiting[: rng.randint(0, 3)]:
            engine.add(waiting.pop(waiting.index(seq)))
        plan = step(engine)
        read = sum(length + 1 for length in began(plan))
        assert read <= engine.prefill_tokens or len(began(plan)) == 1
        if not waiting and not engine.rows_waiting and not engine.rows_running:
            break
    assert all(seq.length - seq.computed == (1 if seq.output else 0) for seq in rows)
    assert engine.kv_tokens_used == 0
