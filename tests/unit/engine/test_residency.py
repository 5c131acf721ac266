"""Tiers: budgets hold, nothing in use leaves, a large delta is not starved by small ones, deleted deltas go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.unit.engine.tiers import Tiers, make, size_of, sum_of

__all__ = ["make"]


def test_nothing_in_use_is_evicted_and_the_budget_holds(make: Callable[..., Tiers]) -> None:
    size = size_of(make, 4)
    tiers = make(device_bytes=2 * size)
    a, b, c = (tiers.ref(4, seed) for seed in range(3))
    tiers.fetched(a, b, c)
    assert tiers.use(a)
    assert tiers.use(b)
    assert not tiers.use(c)
    assert tiers.it.bytes_on_device <= 2 * size
    tiers.it.release(a.digest)
    tiers.it.collect()
    assert tiers.use(c)
    assert [len(tiers.left), tiers.it.count_on_device] == [1, 2]
    assert not tiers.use(a)


def test_what_a_step_was_promised_stays_until_the_next(make: Callable[..., Tiers]) -> None:
    """A delta that was found resident must still be there when its row is admitted later in the same step."""
    size = size_of(make, 4)
    tiers = make(device_bytes=size)
    a, b = tiers.ref(4, 0), tiers.ref(4, 1)
    tiers.fetched(a, b)
    assert tiers.it.resident(a) is not None
    assert tiers.it.resident(b) is None
    tiers.it.acquire(a.digest)


def test_a_large_delta_is_not_starved_by_small_ones(make: Callable[..., Tiers]) -> None:
    small, large = size_of(make, 2), size_of(make, 16)
    tiers = make(device_bytes=large)
    big = tiers.ref(16, 0)
    first, second = tiers.ref(2, 1), tiers.ref(2, 2)
    tiers.fetched(big, first, second)
    assert tiers.use(first)
    tiers.it.collect()
    assert not tiers.use(big)  # has to wait for the first to leave
    assert small < large
    assert not tiers.use(second), "a newcomer took the room that the large one waits for"
    tiers.it.release(first.digest)
    tiers.it.collect()
    assert tiers.use(big)


def test_a_delta_nobody_waits_for_any_more_blocks_nobody(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=size_of(make, 16))
    big = tiers.ref(16, 0)
    first, second = tiers.ref(2, 1), tiers.ref(2, 2)
    tiers.fetched(big, first, second)
    assert tiers.use(first)
    assert not tiers.use(big)
    tiers.it.collect()
    tiers.it.collect()  # a whole step in which nobody asked for it
    assert tiers.use(second)


def test_a_delta_larger_than_the_device_fails_with_the_setting_to_change(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1000)
    big = tiers.ref(16, 0)
    tiers.fetched(big)
    assert tiers.it.resident(big) is None
    (failure,) = tiers.it.collect()
    assert failure.digest == big.digest
    assert "--delta-bytes" in failure.message


def test_a_dropped_delta_leaves_after_its_last_row(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(4, 0)
    tiers.fetched(ref)
    assert tiers.use(ref)
    tiers.it.drop(ref.digest)
    assert tiers.it.count_on_device == 1
    tiers.it.release(ref.digest)
    assert tiers.it.count_on_device == tiers.it.count_on_host == 0


def test_the_host_tier_keeps_to_its_budget(make: Callable[..., Tiers]) -> None:
    size = size_of(make, 4)
    tiers = make(device_bytes=1 << 30, host_bytes=2 * size)
    refs = [tiers.ref(4, seed) for seed in range(5)]
    tiers.fetched(*refs)
    assert tiers.it.bytes_on_host <= 2 * size
    for ref in refs:  # those that were pushed out are read again
        while not tiers.use(ref):
            tiers.woken.get(timeout=30)
            tiers.it.collect()


def test_a_delta_dropped_while_it_loads_is_not_kept(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(4, 0)
    tiers.it.prefetch(ref)
    tiers.it.drop(ref.digest)
    tiers.woken.get(timeout=30)
    tiers.it.collect()
    assert tiers.it.count_on_device == tiers.it.count_on_host == 0
    tiers.fetched(ref)  # and it can come back
    assert tiers.use(ref)


def test_a_sum_leaves_every_tier_with_any_of_its_parts(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1 << 30)
    a, b, c = (tiers.ref(4, seed) for seed in range(3))
    running, on_device, on_host, loading = (
        sum_of(a, b),
        sum_of(b, a),
        sum_of(c, a),
        sum_of(a, b, c),
    )
    other = sum_of(b, c)
    assert not tiers.fetched(running, on_device, on_host, other)
    assert tiers.use(running)
    assert tiers.it.resident(on_device) is not None
    assert tiers.it.resident(other) is not None
    tiers.it.prefetch(loading)
    tiers.it.drop(a.digest)
    assert (tiers.it.count_on_device, tiers.it.count_on_host) == (2, 2)  # the one that runs, and the other
    tiers.woken.get(timeout=30)
    assert not tiers.it.collect()
    assert (tiers.it.count_on_device, tiers.it.count_on_host) == (2, 2)
    tiers.it.release(running.digest)
    assert (tiers.it.count_on_device, tiers.it.count_on_host) == (1, 1)
    assert tiers.it.resident(other) is not None
    assert not tiers.fetched(running)  # the same content may come back
    assert tiers.use(running)


def test_a_sum_is_dropped_after_it_was_evicted_and_came_back(make: Callable[..., Tiers]) -> None:
    """What is known of a sum's parts lasts as long as the sum is in any tier, and no longer."""
    tiers = make(device_bytes=1 << 30, host_bytes=1)
    parts = [tiers.ref(2, seed) for seed in range(2)]
    sums = [sum_of(*parts, weight=1 + n / 10) for n in range(20)]
    for ref in sums:
        assert not tiers.fetched(ref)  # on the host there is room for one only
    assert tiers.it.count_on_host == 1
    assert len(tiers.it._sums) <= 2
    assert not tiers.fetched(sums[0])
    assert tiers.use(sums[0])
    tiers.it.release(sums[0].digest)
    tiers.it.drop(parts[1].digest)
    assert tiers.it.count_on_device == tiers.it.count_on_host == 0


def test_a_failure_says_whether_the_sum_or_a_part_is_at_fault(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1000)
    one, two = tiers.ref(16, 0), tiers.ref(16, 1)
    whole = sum_of(one, two)
    assert not tiers.fetched(whole)
    assert tiers.it.resident(whole) is None
    tiers.woken.get(timeout=30)  # a refusal wakes the loop
    assert [failure.of_sum for failure in tiers.it.collect()] == [True]
    Path(two.path).unlink()
    assert [failure.of_sum for failure in tiers.fetched(whole)] == [False]


def test_what_is_asked_for_first_is_not_pushed_off_the_host_by_what_arrives_with_it(
    make: Callable[..., Tiers],
) -> None:
    size = size_of(make, 4)
    tiers = make(device_bytes=size, host_bytes=size)
    wanted, others = tiers.ref(4, 0), [tiers.ref(4, seed) for seed in range(1, 4)]
    assert tiers.it.resident(wanted) is None  # it is being read from now on
    assert not tiers.fetched(*others)
    while tiers.it.where(wanted.digest).tier == "disk":  # it may be the last to arrive
        tiers.woken.get(timeout=30)
        assert not tiers.it.collect()
    assert tiers.use(wanted)
