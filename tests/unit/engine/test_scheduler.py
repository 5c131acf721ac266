"""The scheduler without tensors: a random engine drives it, and a model of what must hold watches."""

from __future__ import annotations

import ast
import random
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import server.engine.scheduler as scheduler_module
from server.engine.scheduler import IntegrityError, Plan, Scheduler
from server.engine.sequence import Sequence
from server.errors import ContextTooLong, InvalidRequest, Unavailable
from server.types import DeltaRef, SamplingParams

_ids = count()


def row(prompt: int, max_tokens: int = 4, tenant: str = "a", digest: str | None = None) -> Sequence:
    delta = None if digest is None else DeltaRef(digest, f"{digest}.safetensors")
    return Sequence(next(_ids), tenant, [1] * prompt, SamplingParams(max_tokens=max_tokens), delta)


def make(**sizes: int) -> Scheduler:
    defaults = {
        "max_rows": 4,
        "slot_tokens": 64,
        "kv_tokens": 256,
        "prefill_tokens": 16,
        "max_waiting": 100,
    }
    return Scheduler(**(defaults | sizes))  # type: ignore[arg-type]


def resident(_: Sequence) -> int | None:
    return 0


class Engine:
    """A stand-in for the step loop: settles plans, and checks each against what the scheduler promises."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.prefixes: dict[str, int] = {}
        self.loads_at: dict[str, int] = {}  # digest -> the step from which it is resident
        self.stops: dict[int, int] = {}
        self.accepted: dict[int, Sequence] = {}
        self.ended: dict[int, str] = {}
        self.next_token: Counter[int] = Counter()  # by row: the first token not yet computed, as seen here
        self.steps = 0

    def ready(self, seq: Sequence) -> int | None:
        if seq.digest and self.loads_at.get(seq.digest, 0) > self.steps:
            return None
        return self.prefixes.get(seq.digest, 0)

    def add(self, seq: Sequence, stops_after: int | None = None) -> bool:
        try:
            self.scheduler.add(seq)
        except (Unavailable, InvalidRequest):
            return False
        self.accepted[seq.id] = seq
        if stops_after is not None:
            self.stops[seq.id] = stops_after
        return True

    def end(self, seq: Sequence, how: str) -> None:
        assert seq.id not in self.ended
        self.ended[seq.id] = how

    def cancel(self, row_id: int) -> None:
        seq = self.scheduler.cancel(row_id)
        if seq is not None:
            self.end(seq, "cancelled")
            assert self.scheduler.cancel(row_id) is None

    def step(self) -> Plan:
        scheduler = self.scheduler
        decoding = {seq.id for seq in scheduler.running() if seq.decoding}
        plan = scheduler.next(self.ready)
        self.check(plan, decoding)
        for seq in plan.rejected:
            assert seq.prefix == 0
            assert self.prefixes[seq.digest] + len(seq.prompt) >= scheduler.slot_tokens
            self.end(seq, "rejected")
        for planned in plan.rows:
            seq = planned.seq
            self.next_token[seq.id] += planned.count
            seq.advance(planned.count, 7 if planned.samples else None)
            stopped = len(seq.output) == self.stops.get(seq.id, -1)
            if stopped or (not seq.remaining and (planned.samples or not seq.uncomputed)):
                self.end(seq, "done")
                scheduler.finish(seq)
        self.steps += 1
        scheduler.check_integrity()
        return plan

    def check(self, plan: Plan, decoding: set[int]) -> None:
        scheduler = self.scheduler
        ids = [planned.seq.id for planned in plan.rows]
        assert len(set(ids)) == len(ids) <= scheduler.max_rows
        decode, prefill = plan.rows[: plan.decode_rows], plan.rows[plan.decode_rows :]
        assert {planned.seq.id for planned in decode} == decoding  # every one, every step
        assert all(planned.count == 1 and planned.samples for planned in decode)
        assert sum(planned.count for planned in prefill) <= scheduler.prefill_tokens
        backlog = sum(seq.uncomputed for seq in scheduler.running() if seq.id not in decoding)
        assert sum(p.count for p in prefill) == min(scheduler.prefill_tokens, backlog)  # nothing is wasted
        for planned in plan.rows:
            seq = planned.seq
            assert seq.slot is not None
            assert planned.start == self.next_token[seq.id] == seq.computed  # once each, in order
            assert 1 <= planned.count <= seq.uncomputed
            assert planned.samples == (planned.count == seq.uncomputed and seq.remaining > 0)
            assert seq.prefix + seq.length + (1 if planned.samples else 0) <= scheduler.slot_tokens
            assert self.ready(seq) == seq.prefix or seq not in plan.admitted
        for group in (decode, prefill):
            digests = [planned.seq.digest for planned in group]
            seen = list(dict.fromkeys(digests))
            assert digests == [d for digest in seen for d in digests if d == digest]  # adjacent
            assert "" not in seen[1:]  # base rows first
        slots = [seq.slot for seq in scheduler.running()]
        assert len(set(slots)) == len(slots)
        assert scheduler.kv_tokens_used <= scheduler.kv_tokens
        assert hash(plan.composition) == hash(tuple((p.seq.id, p.count) for p in plan.rows))

    def drain(self, bound: int) -> None:
        for _ in range(bound):
            if not self.scheduler.rows_running and not self.scheduler.rows_waiting:
                break
            self.step()
        assert set(self.ended) == set(self.accepted), "an accepted row never ended"
        assert self.scheduler.kv_tokens_used == 0
        assert self.scheduler.rows_running == self.scheduler.rows_waiting == 0
        self.scheduler.check_integrity()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    max_rows=st.integers(1, 6),
    slot_tokens=st.integers(2, 60),
    slots_worth=st.floats(1, 4),
    prefill_tokens=st.integers(1, 24),
    max_waiting=st.integers(1, 20),
    arrivals=st.integers(1, 40),
)
def test_random_traffic(
    seed: int,
    max_rows: int,
    slot_tokens: int,
    slots_worth: float,
    prefill_tokens: int,
    max_waiting: int,
    arrivals: int,
) -> None:
    chance = random.Random(seed)
    scheduler = make(
        max_rows=max_rows,
        slot_tokens=slot_tokens,
        kv_tokens=int(slot_tokens * slots_worth),
        prefill_tokens=prefill_tokens,
        max_waiting=max_waiting,
    )
    engine = Engine(scheduler)
    for digest in "bcdef":
        engine.prefixes[digest] = chance.choice([0, 0, 3, slot_tokens // 2, slot_tokens])
        engine.loads_at[digest] = chance.randint(0, 30)
    for _ in range(arrivals):
        for _ in range(chance.choice([0, 1, 1, 3])):
            seq = row(
                prompt=chance.randint(0, slot_tokens + 1),
                max_tokens=chance.choice([0, 1, 2, 5, 200]),
                tenant=chance.choice("xyz"),
                digest=chance.choice([None, *"bcdef"]),
            )
            fits = 0 < len(seq.prompt) < slot_tokens
            room = scheduler.rows_waiting < max_waiting
            assert engine.add(seq, chance.choice([None, None, 1, 3])) == (fits and room)
        if engine.accepted and chance.random() < 0.2:
            engine.cancel(chance.choice(list(engine.accepted)))
        if chance.random() < 0.05:
            for failed in scheduler.fail_waiting("b"):
                engine.end(failed, "failed")
        scheduler.check_integrity()
        if chance.random() < 0.9:
            engine.step()
    work = sum(
        len(seq.prompt) + min(seq.sampling.max_tokens, slot_tokens) for seq in engine.accepted.values()
    )
    engine.drain(bound=30 + work + len(engine.accepted))
    assert list(scheduler.waiting()) == []


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.integers(1, 50),
    tokens=st.integers(1, 13),
    flood=st.integers(1, 40),
    own_tenant=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_nothing_starves_under_a_flood_that_never_ends(
    prompt: int, tokens: int, flood: int, own_tenant: bool, seed: int
) -> None:
    """Short rows keep coming for as long as the test looks; a row among them still ends in bounded time."""
    chance = random.Random(seed)
    engine = Engine(make(kv_tokens=80))
    for _ in range(chance.randint(0, 30)):
        engine.add(row(chance.randint(1, 9), chance.randint(1, 6), "flood"))
        engine.step()
    ahead = engine.scheduler.rows_waiting
    seq = row(prompt, tokens, "own" if own_tenant else "flood")
    assert engine.add(seq)
    bound = 2 * (40 + ahead * 16 + prompt + tokens)
    for _ in range(bound):
        if seq.id in engine.ended:
            break
        for _ in range(min(flood, engine.scheduler.max_waiting - engine.scheduler.rows_waiting)):
            engine.add(row(chance.randint(1, 9), chance.randint(1, 6), "flood"))
        engine.step()
    assert engine.ended.get(seq.id) == "done"


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


def test_weights_scale_the_share() -> None:
    scheduler = Scheduler(
        max_rows=3, slot_tokens=64, kv_tokens=192, prefill_tokens=16, max_waiting=99, weights={"gold": 3.0}
    )
    engine = Engine(scheduler)
    served: Counter[str] = Counter()
    for _ in range(3000):
        lines = Counter(seq.tenant for seq in scheduler.waiting())
        for tenant in ("gold", "plain"):
            if lines[tenant] < 4:
                engine.add(row(8, 8, tenant))
        for planned in engine.step().rows:
            served[planned.seq.tenant] += planned.count
    assert served["gold"] / served["plain"] == pytest.approx(3.0, rel=0.1)


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
    assert seq.tokens(0, 2) == [1, 1]
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
    scheduler._kv_used += 1
    with pytest.raises(IntegrityError, match="KV tokens"):
        scheduler.check_integrity()
    scheduler._kv_used -= 1
    scheduler._free.pop()
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
