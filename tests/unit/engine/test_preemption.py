"""Rows that give their keys and values up for others, and compute them again: nothing is lost, nobody starves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.engine.scheduler import GROWTH
from tests.tiny import KINDS, random_delta
from tests.unit.engine.running import Harness, harnesses
from tests.unit.engine.scheduling import Engine, make, row


def test_more_rows_run_than_could_all_become_as_long_as_they_may() -> None:
    """Eight rows of 20 tokens that may become 320 in a budget of 640: those that stop early never meet the limit."""
    engine = Engine(make(max_rows=8, slot_tokens=320, kv_tokens=640, prefill_tokens=200))
    for _ in range(8):
        engine.add(row(20, 300), stops_after=10)
    engine.step()
    assert engine.scheduler.rows_running == 8
    engine.drain(100)
    assert engine.scheduler.preemptions == 0


def test_the_newest_row_goes_back_and_comes_first_again() -> None:
    engine = Engine(make(max_rows=4, slot_tokens=200, kv_tokens=240, prefill_tokens=200))
    rows = [row(20, 100) for _ in range(3)]
    for seq in rows:
        engine.add(seq)
    later = row(20, 100)
    order: list[int] = []
    plan = engine.step()
    assert plan.admitted == rows
    while not plan.preempted:
        plan = engine.step()
        assert engine.steps < 200
    assert plan.preempted == [rows[2]]
    engine.add(later)
    while len(engine.ended) < 4:
        order += [seq.id for seq in engine.step().admitted]
        assert engine.scheduler.kv_tokens_used <= engine.scheduler.kv_tokens
        assert engine.steps < 2000
    assert order.index(rows[2].id) < order.index(later.id)
    assert all(len(seq.output) == 100 for seq in [*rows, later])


def test_who_was_served_most_gives_way() -> None:
    engine = Engine(make(max_rows=4, slot_tokens=300, kv_tokens=300, prefill_tokens=300))
    greedy = [row(60, 200, tenant="greedy") for _ in range(2)]
    for seq in greedy:
        engine.add(seq)
    engine.step()
    modest = row(30, 60, tenant="modest")  # the newest
    engine.add(modest)
    preempted = []
    while modest.id not in engine.ended:
        preempted += engine.step().preempted
        assert engine.steps < 1000
    assert preempted
    assert modest not in preempted
    engine.drain(5000)
    assert all(len(seq.output) == 200 for seq in greedy)


def test_what_is_computed_again_is_not_charged_again() -> None:
    engine = Engine(make(max_rows=2, slot_tokens=150, kv_tokens=150, prefill_tokens=150))
    for tenant in ("a", "b"):
        engine.add(row(40, 60, tenant=tenant))
    charged = 0.0
    while engine.scheduler.rows_running or engine.scheduler.rows_waiting:
        engine.step()
        counters = [engine.scheduler._queue.served(tenant) for tenant in ("a", "b")]
        charged = max(charged, sum(counters))
    assert engine.scheduler.preemptions
    assert charged <= 2 * (40 + 60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    with harnesses(tmp_path / "tiny") as made:
        yield made


@pytest.mark.parametrize("kv", ["slots", "paged"])
def test_answers_are_the_same_with_little_memory(start: Callable[..., Harness], kv: str) -> None:
    """Rows of all kinds, some with logprobs of their prompt, with memory for a third of them."""
    from server.engine.kv import token_bytes  # needs torch
    from server.engine.paged import PAGE

    plenty = start(max_model_len=256)
    backbone = plenty.engine.runner.backbone
    token = token_bytes(backbone.spec, backbone.dtype)
    scratch = 256 + 7 * PAGE if kv == "paged" else 0  # and a page of each slot that is not full
    little = start(max_model_len=256, kv=kv, kv_bytes=(260 + scratch) * token)
    assert little.engine.scheduler.kv_tokens == 260
    refs = [None, *(plenty.save(random_delta(backbone.spec, kind, 1)) for kind in KINDS)]
    count = 2 * len(refs)
    for engine in (plenty, little):
        for n in range(count):
            prompt = [3 + (n * 37 + i * 11) % 250 for i in range(20 + n)]
            scored = 0 if n % 3 == 0 else None
            engine.submit(n, prompt, refs[n % len(refs)], max_tokens=2 * GROWTH, prompt_logprobs=scored)
        engine.wait(*range(count))
    assert little.engine.scheduler.preemptions
    assert not plenty.engine.scheduler.preemptions
    if kv == "paged":
        assert [*little.engine.runner.kv.pages.problems()] == []
    for n in range(count):
        assert little.tokens(n) == plenty.tokens(n)
        got, wanted = little.events[n][0].prompt_logprobs, plenty.events[n][0].prompt_logprobs
        assert (got is None) == (wanted is None)
        assert got is None or [entry and entry.token for entry in got] == [
            entry and entry.token for entry in wanted or []
        ]
    little.wait_stats(lambda stats: stats.preemptions > 0)
    little.engine.scheduler.check_integrity()
