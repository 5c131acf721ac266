"""The scheduler without tensors: what it promises, one promise a test."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import server.engine.scheduler as scheduler_module
from server.engine.scheduler import IntegrityError
from server.engine.sequence import Sequence
from server.errors import ContextTooLong, InvalidRequest, Unavailable
from tests.unit.engine.scheduling import Engine, make, resident, row


def test_a_row_whose_delta_loads_is_skipped_and_keeps_its_place() -> None:
    engine = Engine(make(max_rows=2))
    engine.loads_at["slow"] = 3
    slow, base, later = row(4, 20, digest="slow"), row(4, 2), row(4, 20)
    for seq in (slow, base, later):
        engine.add(seq)
    first = engine.step()
    assert [p.seq for p in first.rows] == [base, later]
    newest = row(4, 2)
    engine.add(newest)
    engine.step()  # base ends here: one slot free from now on
    assert engine.ended == {base.id: "done"}
    engine.step()
    assert newest.slot is not None
    while slow.slot is None:
        engine.step()
    assert newest.id in engine.ended
    # Behind it in line: nobody, since it kept its place.
    engine.drain(100)


def test_the_delta_of_a_line_is_asked_for_once_a_step() -> None:
    scheduler = make(max_rows=3)
    for _ in range(10):
        scheduler.add(row(3, digest="d"))
    asked: list[Sequence] = []

    def loading(seq: Sequence) -> int | None:
        asked.append(seq)
        return None

    plan = scheduler.next(loading)
    assert plan.rows == []
    assert len(asked) == 1
    assert len(list(scheduler.waiting())) == 10


def test_a_prefix_that_leaves_no_room_ends_the_row_and_nobody_else() -> None:
    engine = Engine(make())
    engine.prefixes["long"] = 60
    bad, good = row(4, digest="long"), row(3, digest="long")
    engine.add(bad)
    engine.add(good)
    plan = engine.step()
    assert plan.rejected == [bad]
    assert [p.seq for p in plan.rows] == [good]
    assert good.prefix == 60
    assert good.limit == 1  # 60 + 3 + 1 fill the slot
    engine.drain(10)
    assert engine.ended == {bad.id: "rejected", good.id: "done"}


def test_decode_rows_run_beside_a_long_prompt_and_a_short_one_overtakes_it() -> None:
    engine = Engine(make(prefill_tokens=16, slot_tokens=1000, kv_tokens=4000))
    talker = row(4, 100)
    engine.add(talker)
    engine.step()
    long, short = row(900, 1), row(8, 1, tenant="b")
    engine.add(long)
    plan = engine.step()
    assert [(p.seq, p.count) for p in plan.rows] == [(talker, 1), (long, 16)]
    engine.add(short)
    plan = engine.step()
    assert [(p.seq, p.count) for p in plan.rows] == [(talker, 1), (long, 8), (short, 8)]
    assert engine.ended == {short.id: "done"}
    # The same tenant's short prompts overtake its long one too, but only with half of the budget.
    other = row(40, 1)
    engine.add(other)
    plan = engine.step()
    assert {p.seq: p.count for p in plan.rows} == {talker: 1, long: 8, other: 8}


def test_free_slots_are_shared_between_tenants_at_once() -> None:
    scheduler = make(max_rows=4)
    for _ in range(10):
        scheduler.add(row(10, 4, "greedy"))
    for _ in range(2):
        scheduler.add(row(10, 4, "modest"))
    plan = scheduler.next(resident)
    assert Counter(seq.tenant for seq in plan.admitted) == {"greedy": 2, "modest": 2}


def test_service_follows_tokens_not_rows() -> None:
    """Two tenants always have work; one's rows are four times as long. They get equal tokens."""
    scheduler = make(max_rows=2, kv_tokens=128)
    engine = Engine(scheduler)
    served: Counter[str] = Counter()
    for _ in range(2000):
        lines = Counter(seq.tenant for seq in scheduler.waiting())
        if lines["short"] < 2:
            engine.add(row(4, 8, "short"))
        if lines["long"] < 2:
            engine.add(row(16, 32, "long"))
        for planned in engine.step().rows:
            served[planned.seq.tenant] += planned.count
    assert served["short"] == pytest.approx(served["long"], rel=0.05)


def test_an_idle_tenant_banks_no_credit_and_a_busy_one_sheds_no_debt() -> None:
    scheduler = make(max_rows=1)
    engine = Engine(scheduler)
    for _ in range(20):
        engine.add(row(4, 10, "busy"))
        for _ in range(9):
            engine.step()
    engine.add(row(4, 10, "busy"))
    engine.add(row(4, 10, "busy"))
    engine.add(row(4, 10, "fresh"))
    queue = scheduler._queue
    assert queue.served("fresh") == queue.served("busy") > 0  # lifted: no credit for having been away
    engine.drain(100)
    assert queue.served("busy") == queue.served("fresh") == 0  # nobody left: nothing kept
    busy, other = row(40, 10, "busy"), row(2, 20, "other")
    engine.add(busy)
    engine.add(other)
    while busy.id not in engine.ended:
        engine.step()
    debt = queue.served("busy")
    assert debt > queue.served("other")
    engine.add(row(4, 1, "busy"))
    assert queue.served("busy") == debt


def test_a_large_row_is_not_passed_for_ever_by_small_ones() -> None:
    engine = Engine(make(kv_tokens=64))
    engine.add(row(10, 30))
    engine.step()
    large, small = row(10, 50), row(2, 2)
    engine.add(large)
    engine.add(small)
    engine.step()
    assert large.slot is None
    assert small.slot is None  # would fit, but not before the large one
    engine.drain(200)


def test_prompts_that_cannot_fit_are_refused_at_once() -> None:
    scheduler = make(slot_tokens=8, kv_tokens=8)
    with pytest.raises(ContextTooLong) as caught:
        scheduler.add(row(8))
    assert caught.value.status == 400
    with pytest.raises(InvalidRequest):
        scheduler.add(row(0))
    with pytest.raises(InvalidRequest):
        scheduler.add(row(1, -1))
    scheduler.check_integrity()
    scheduler.add(row(7, 1000))  # clipped, not refused
    plan = scheduler.next(resident)
    assert plan.admitted[0].limit == 1


def test_too_many_waiting_is_unavailable() -> None:
    scheduler = make(max_waiting=2)
    scheduler.add(row(3))
    scheduler.add(row(3))
    with pytest.raises(Unavailable) as caught:
        scheduler.add(row(3))
    assert caught.value.status == 503
    assert caught.value.headers() == {"retry-after": "1"}
    scheduler.next(resident)
    scheduler.add(row(3))


def test_a_row_that_asks_for_no_tokens_is_computed_and_never_sampled() -> None:
    engine = Engine(make())
    seq = row(20, 0)
    engine.add(seq)
    plans = [engine.step(), engine.step()]
    assert [p.samples for plan in plans for p in plan.rows] == [False, False]
    assert engine.ended == {seq.id: "done"}


def test_composition_repeats_while_only_lengths_change() -> None:
    engine = Engine(make(max_rows=4, prefill_tokens=64))
    for digest in ("d", None, "c", "d"):
        engine.add(row(4, 20, digest=digest))
    first = engine.step()
    second, third = engine.step(), engine.step()
    assert first.composition != second.composition == third.composition
    assert first.tokens == 16
    assert second.tokens == 4
    assert [p.seq.digest for p in second.rows] == ["", "c", "d", "d"]


def test_a_row_without_kv_computes_prompt_and_output_again() -> None:
    """The seam for preemption: a sequence needs no state but ``computed``."""
    seq = row(5, 9)
    seq.advance(5, 11)
    seq.advance(1, 12)
    assert seq.decoding
    assert seq.last_token == 12
    seq.computed = 0
    assert not seq.decoding
    assert seq.uncomputed == 7
    assert seq.tokens(3, 4) == [1, 1, 11, 12]
    assert seq.tokens(0, 2) == [seq.id, 1]
    assert seq.tokens(5, 2) == [11, 12]


def test_broken_books_are_noticed() -> None:
    scheduler = make()
    seq = row(4)
    with pytest.raises(ValueError, match="not in the scheduler"):
        scheduler.finish(seq)
    scheduler.add(seq)
    with pytest.raises(ValueError, match="already known"):
        scheduler.add(seq)
    scheduler.next(resident)
    scheduler.check_integrity()
    seq.computed = 99
    with pytest.raises(IntegrityError, match="computed 99"):
        scheduler.check_integrity()
    seq.computed = 0
    scheduler._pool.take(None, 0)
    with pytest.raises(IntegrityError, match="slots"):
        scheduler.check_integrity()


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="cannot hold one slot"):
        make(kv_tokens=63)
    with pytest.raises(ValueError, match="at least 1"):
        make(max_rows=0)


def test_no_tensors_in_scheduling() -> None:
    folder = Path(scheduler_module.__file__).parent
    for name in ("scheduler.py", "waiting.py", "sequence.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [n for n in names if n.split(".")[0] in {"torch", "numpy", "deltas"}]
