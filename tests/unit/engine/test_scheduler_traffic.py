"""Random traffic through the scheduler: nothing leaks, nothing starves, every token is computed once and in order."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.engine.scheduling import Engine, make, row


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
