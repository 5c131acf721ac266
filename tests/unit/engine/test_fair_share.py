"""Shares of the engine between tenants, and the order of a tenant's own rows."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.chunks import chunks
from tests.unit.engine.scheduling import Engine, make, resident, row


def shares(
    weights: dict[str, float], sizes: dict[str, tuple[int, int]], steps: int, slots: int
) -> Counter[str]:
    """Tokens that tenants are served which always have rows waiting, each of its own size (prompt, answer)."""
    engine = Engine(make(max_rows=slots, kv_tokens=64 * slots))
    served: Counter[str] = Counter()
    for _ in range(steps):
        lines = Counter(seq.tenant for seq in engine.scheduler.waiting())
        for tenant, weight in weights.items():
            for _ in range(lines[tenant], 2 * slots):
                engine.add(row(*sizes[tenant], tenant, weight=weight))
        for planned in engine.step().rows:
            served[planned.seq.tenant] += planned.count
    return served


@settings(max_examples=25, deadline=None)
@given(
    weight=st.floats(0.2, 5.0),
    one=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    two=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    slots=st.integers(1, 4),
)
def test_shares_of_two_busy_tenants_converge_to_their_weights(
    weight: float, one: tuple[int, int], two: tuple[int, int], slots: int
) -> None:
    """Counters differ by what their rows in flight have still to be served, however long it goes on."""
    served = shares({"a": weight, "b": 1.0}, {"a": one, "b": two}, 600, slots)
    ahead = slots * (sum(one) / weight + sum(two))
    assert abs(served["a"] / weight - served["b"]) <= 2 * ahead


def test_three_tenants_get_what_their_weights_say() -> None:
    sizes = dict.fromkeys(("bronze", "silver", "gold"), (8, 8))
    served = shares({"bronze": 0.5, "silver": 1.0, "gold": 3.0}, sizes, 3000, 3)
    assert served["gold"] / served["silver"] == pytest.approx(3.0, rel=0.1)
    assert served["silver"] / served["bronze"] == pytest.approx(2.0, rel=0.1)


def test_a_new_weight_counts_from_the_next_row_on() -> None:
    engine = Engine(make(max_rows=2, kv_tokens=128))
    served: Counter[str] = Counter()
    for step in range(4000):
        if step == 2000:
            served.clear()
        lines = Counter(seq.tenant for seq in engine.scheduler.waiting())
        for tenant in ("a", "b"):
            if lines[tenant] < 4:
                engine.add(row(8, 8, tenant, weight=4.0 if tenant == "a" and step >= 2000 else 1.0))
        for planned in engine.step().rows:
            served[planned.seq.tenant] += planned.count
    assert served["a"] / served["b"] == pytest.approx(4.0, rel=0.1)


def test_nothing_is_kept_of_tenants_that_are_gone() -> None:
    engine = Engine(make())
    for n in range(50):
        engine.add(row(3, 2, f"tenant-{n}", weight=2.0))
    engine.drain(200)
    assert engine.scheduler._queue._weights == {}


def test_priority_orders_a_tenants_own_line() -> None:
    engine = Engine(make(max_rows=1, kv_tokens=64))
    order = [0, 5, -2, 5, 0, -(2**63), 2**63 - 1]
    rows = [row(2, 2, priority=priority) for priority in order]
    for seq in rows:
        engine.add(seq)
    begun: list[int] = []
    while engine.scheduler.rows_waiting or engine.scheduler.rows_running:
        begun += [seq.id for seq in engine.step().admitted]
    assert begun == [seq.id for seq in sorted(rows, key=lambda seq: (seq.priority, seq.id))]


def test_no_priority_takes_another_tenants_share() -> None:
    engine = Engine(make(max_rows=1, kv_tokens=64))
    for _ in range(20):
        engine.add(row(4, 4, "pushy", priority=-1000))
        engine.add(row(4, 4, "patient", priority=1000))
    begun: list[str] = []
    while len(begun) < 20:
        begun += [seq.tenant for seq in engine.step().admitted]
    assert Counter(begun) == {"pushy": 10, "patient": 10}


def test_the_least_urgent_row_of_the_busiest_tenant_gives_way() -> None:
    engine = Engine(make(max_rows=4, slot_tokens=200, kv_tokens=240, prefill_tokens=200))
    urgent, idle, middling = (row(20, 100, priority=priority) for priority in (0, 9, 3))
    for seq in (urgent, idle, middling):
        engine.add(seq)
    preempted = engine.step().preempted
    while not preempted:
        preempted = engine.step().preempted
    assert preempted == [idle]
    later = row(20, 100, priority=3)
    engine.add(later)
    begun: list[int] = []
    while len(engine.ended) < 4:
        begun += [seq.id for seq in engine.step().admitted]
    assert begun.index(later.id) < begun.index(idle.id)  # it waits behind what is more urgent
    assert all(len(seq.output) == 100 for seq in (urgent, idle, middling, later))


def test_a_preempted_row_goes_before_others_of_its_priority() -> None:
    engine = Engine(make(max_rows=2, slot_tokens=120, kv_tokens=120, prefill_tokens=120))
    first, second = row(10, 80, priority=1), row(10, 80, priority=1)
    engine.add(first)
    engine.add(second)
    plan = engine.step()
    while not plan.preempted:
        plan = engine.step()
    engine.add(row(10, 5, priority=1))
    assert next(engine.scheduler.waiting()) is second
    urgent = row(10, 5, priority=0)
    engine.add(urgent)
    assert next(engine.scheduler.waiting()) is urgent


def test_prompts_of_a_tenant_are_computed_by_priority() -> None:
    """The half of a step's budget that goes by fairness: the tenants' order stays, priorities order each one's rows."""
    late, soon = row(40, priority=2), row(40, priority=1)
    other = row(40, tenant="b", priority=0)
    assert chunks([late, soon, other], 20, lambda _: 0.0)[soon.id] >= 10
    assert other.id not in chunks([late, soon, other], 20, lambda tenant: float(tenant == "b"))


def test_a_slot_is_offered_first_to_the_row_whose_delta_was_not_there() -> None:
    engine = Engine(make(max_rows=1, kv_tokens=64))
    engine.loads_at["slow"] = 4
    waiting = row(4, 2, "a", "slow")
    engine.add(waiting)
    for _ in range(10):
        engine.add(row(4, 2, "b"))
    while waiting.id not in engine.ended:
        plan = engine.step()
        assert engine.steps < 15
        if engine.steps > 5 and plan.admitted:
            assert plan.admitted == [waiting]
    assert engine.scheduler._queue.favoured is None
    engine.drain(100)


def test_a_favoured_row_that_cannot_fit_is_rejected_once() -> None:
    engine = Engine(make())
    engine.prefixes["long"], engine.loads_at["long"] = 64, 2
    bad = row(4, digest="long")
    engine.add(bad)
    engine.add(row(4, 1))
    while bad.id not in engine.ended:
        assert engine.scheduler._queue.favoured in (None, bad)
        engine.step()
    assert engine.ended[bad.id] == "rejected"
    assert engine.scheduler._queue.favoured is None


def test_a_cancelled_row_is_favoured_no_more() -> None:
    scheduler = make()
    one, two = row(4, digest="d"), row(4, digest="e")
    scheduler.add(one)
    scheduler.add(two)
    scheduler.next(lambda _: None)
    assert scheduler._queue.favoured is one
    scheduler.cancel(one.id)
    scheduler.check_integrity()
    scheduler.next(lambda _: None)
    assert scheduler._queue.favoured is two
    scheduler.next(resident)
    scheduler.check_integrity()
