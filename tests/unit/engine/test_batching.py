"""The encoder's batches: fair between tenants, within budgets, nothing left behind."""

from __future__ import annotations

import random

import pytest

from server.engine.batching import Batcher, EncodeJob
from server.errors import Unavailable
from server.types import DeltaRef, EncoderInput, Want


def job(row: int, tokens: int, tenant: str = "a", digest: str = "") -> EncodeJob:
    return EncodeJob(
        row, tenant, EncoderInput([3] * tokens), DeltaRef(digest) if digest else None, Want("embedding"), 0.0
    )


def batcher(**changes: int) -> Batcher:
    return Batcher(**({"max_rows": 8, "step_tokens": 20, "max_waiting": 100} | changes))


def here(_job: EncodeJob) -> int:
    return 0


def test_a_step_keeps_to_its_budgets() -> None:
    rows = batcher(max_rows=3)
    for n in range(5):
        rows.add(job(n, 6))
    assert [item.id for item in rows.next(here)] == [0, 1, 2]
    assert [item.id for item in rows.next(here)] == [3, 4]
    assert rows.next(here) == []
    rows.check_integrity()


def test_a_row_beyond_the_budget_goes_alone_and_is_not_passed_over() -> None:
    rows = batcher()
    rows.add(job(1, 6))
    rows.add(job(2, 50))
    rows.add(job(3, 6))
    assert [[item.id for item in rows.next(here)] for _ in range(3)] == [[1], [2], [3]]


def test_virtual_tokens_count() -> None:
    rows = batcher()
    rows.add(job(1, 6, digest="d"))
    rows.add(job(2, 6, digest="d"))
    assert [item.id for item in rows.next(lambda _job: 10)] == [1]


def test_rows_of_one_delta_are_adjacent() -> None:
    rows = batcher()
    for n, digest in enumerate(["b", "", "a", "b", "a", ""]):
        rows.add(job(n, 2, digest=digest))
    assert [item.digest for item in rows.next(here)] == ["", "", "a", "a", "b", "b"]


def test_a_row_whose_delta_is_loading_keeps_its_place() -> None:
    rows = batcher(max_rows=1)
    rows.add(job(1, 2, digest="slow"))
    rows.add(job(2, 2))
    assert [item.id for item in rows.next(lambda item: None if item.digest else 0)] == [2]
    assert [item.id for item in rows.next(here)] == [1]


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    rows = batcher()
    for n in range(60):
        rows.add(job(n, 5, "flood"))
    rows.next(here)
    rows.add(job(99, 5, "guest"))
    assert 99 in [item.id for item in rows.next(here)]


def test_tokens_are_shared_evenly() -> None:
    """One tenant's rows are four times as long: it gets a quarter as many."""
    rows = batcher(step_tokens=40, max_waiting=1000)
    for n in range(400):
        rows.add(job(n, 16, "long"))
        rows.add(job(1000 + n, 4, "short"))
    tokens = {"long": 0, "short": 0}
    for _ in range(30):
        for item in rows.next(here):
            tokens[item.tenant] += len(item.row.ids)
    assert abs(tokens["long"] - tokens["short"]) <= 40


def test_cancelled_and_failed_rows_leave() -> None:
    rows = batcher()
    for n, digest in enumerate(["bad", "", "bad", "good"]):
        rows.add(job(n, 2, digest=digest))
    rows.cancel(1)
    rows.cancel(1)
    assert [item.id for item in rows.fail_waiting("bad")] == [0, 2]
    assert [item.id for item in rows.next(here)] == [3]
    rows.check_integrity()
    assert len(rows) == 0


def test_too_many_wait() -> None:
    rows = batcher(max_waiting=1)
    rows.add(job(1, 2))
    with pytest.raises(Unavailable, match="waiting already"):
        rows.add(job(2, 2))


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic(seed: int) -> None:
    """Every row ends once, and the books add up at every step."""
    draw = random.Random(seed)
    rows = batcher(max_rows=draw.randint(1, 8), step_tokens=draw.randint(1, 40))
    waiting: set[int] = set()
    ended: list[int] = []
    for step in range(300):
        if draw.random() < 0.6 and step < 250:
            digest = draw.choice(["", "a", "b", "c"])
            rows.add(job(step, draw.randint(1, 50), draw.choice("xyz"), digest))
            waiting.add(step)
        if waiting and draw.random() < 0.1:
            gone = draw.choice(sorted(waiting))
            rows.cancel(gone)
            waiting.remove(gone)
        loading = draw.choice(["", "a", "b"])
        taken = rows.next(lambda item, loading=loading: None if loading and item.digest == loading else 1)
        ended += [item.id for item in taken]
        waiting -= {item.id for item in taken}
        assert sum(item.uncomputed for item in taken) <= rows.step_tokens or len(taken) == 1
        rows.check_integrity()
    while left := rows.next(here):
        waiting -= {item.id for item in left}
    assert not waiting
    assert len(ended) == len(set(ended))
