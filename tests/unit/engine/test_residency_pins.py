"""Tiers by the user's hand: pins hold and are bounded, what is sent down leaves after its last row; reads are few."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest

from server.engine.loaders import Loaders
from server.types import DeltaRef
from tests.unit.engine.tiers import Tiers, make, size_of

__all__ = ["make"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each digest was given to a loader."""
    found: Counter[str] = Counter()
    load = Loaders.load

    def counted(self: Loaders, ref: DeltaRef) -> None:
        found[ref.digest] += 1
        load(self, ref)

    monkeypatch.setattr(Loaders, "load", counted)
    return found


def tier(tiers: Tiers, ref: DeltaRef) -> str:
    return tiers.it.where(ref.digest).tier


def test_a_pinned_delta_is_not_evicted_for_others(make: Callable[..., Tiers]) -> None:
    size = size_of(make, 4)
    tiers = make(device_bytes=2 * size)
    kept, *others = (tiers.ref(4, seed) for seed in range(4))
    tiers.fetched(kept, *others)
    assert tiers.it.resident(kept) is not None
    assert tiers.it.refuses_pin(kept.digest, "device") is None
    tiers.it.pin(kept.digest, "device")
    for other in others:
        tiers.it.collect()
        assert tiers.it.resident(other) is not None
        assert tier(tiers, kept) == "device"
    tiers.it.pin(kept.digest, None)
    tiers.it.collect()
    assert tiers.it.resident(others[0]) is not None
    assert tier(tiers, kept) == "host"


def test_a_delta_pinned_on_the_host_stays_there(make: Callable[..., Tiers]) -> None:
    size = size_of(make, 4)
    tiers = make(device_bytes=1 << 30, host_bytes=2 * size)
    kept, *others = (tiers.ref(4, seed) for seed in range(4))
    tiers.fetched(kept)
    assert tiers.it.refuses_pin(kept.digest, "host") is None
    tiers.it.pin(kept.digest, "host")
    for other in others:
        tiers.fetched(other)
    assert [tier(tiers, ref) for ref in (kept, *others)] == ["host", "disk", "disk", "host"]


def test_pins_are_bounded_by_their_share(make: Callable[..., Tiers]) -> None:
    size = size_of(make, 4)
    tiers = make(device_bytes=4 * size, host_bytes=4 * size)
    refs = [tiers.ref(4, seed) for seed in range(3)]
    tiers.fetched(*refs)
    for ref in refs[:2]:
        assert tiers.it.resident(ref) is not None
        assert tiers.it.refuses_pin(ref.digest, "device") is None
        tiers.it.pin(ref.digest, "device")
    refusal = tiers.it.refuses_pin(refs[2].digest, "device")
    assert refusal is not None
    assert f"--pinned-delta-share 0.5 of --delta-bytes {4 * size}" in refusal
    assert tiers.it.refuses_pin(refs[0].digest, "device") is None  # it holds already
    assert tiers.it.refuses_pin(refs[2].digest, "host") is None  # a budget of its own


def test_a_pin_leaves_room_for_the_largest_delta(make: Callable[..., Tiers]) -> None:
    small, large = size_of(make, 2), size_of(make, 16)
    tiers = make(device_bytes=large + small - 1, pinned_share=1.0)
    little, big = tiers.ref(2, 0), tiers.ref(16, 1)
    tiers.fetched(little, big)
    refusal = tiers.it.refuses_pin(little.digest, "device")
    assert refusal is not None
    assert f"the largest delta in memory takes {large}" in refusal


def test_a_delta_that_pins_leave_no_room_for_fails_at_once(make: Callable[..., Tiers]) -> None:
    """It would wait for ever."""
    small, large = size_of(make, 2), size_of(make, 16)
    tiers = make(device_bytes=large + small - 1, pinned_share=1.0)
    little, big = tiers.ref(2, 0), tiers.ref(16, 1)
    tiers.fetched(little)
    assert tiers.it.resident(little) is not None
    tiers.it.pin(little.digest, "device")
    tiers.fetched(big)
    assert tiers.it.resident(big) is None
    (failure,) = tiers.it.collect()
    assert f"pins hold {small}" in failure.message


def test_sent_to_the_host_it_leaves_the_device_after_its_last_row(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(4, 0)
    tiers.fetched(ref)
    assert tiers.use(ref)
    assert tiers.use(ref)
    tiers.it.to_host(ref.digest)
    tiers.it.release(ref.digest)
    assert tier(tiers, ref) == "device"
    tiers.it.release(ref.digest)
    assert (tier(tiers, ref), len(tiers.left)) == ("host", 1)


def test_a_row_that_asks_meanwhile_keeps_it_on_the_device(make: Callable[..., Tiers]) -> None:
    """A preempted row may release it between the promise to another row and that row's start."""
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(4, 0)
    tiers.fetched(ref)
    assert tiers.use(ref)
    tiers.it.to_host(ref.digest)
    assert tiers.it.resident(ref) is not None
    tiers.it.release(ref.digest)
    tiers.it.acquire(ref.digest)
    tiers.it.release(ref.digest)
    assert tier(tiers, ref) == "device"


def test_sent_to_the_host_it_is_there_also_if_the_host_had_let_it_go(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1 << 30, host_bytes=1)
    ref, other = tiers.ref(4, 0), tiers.ref(4, 1)
    tiers.fetched(ref)
    assert tiers.it.resident(ref) is not None
    tiers.fetched(other)
    tiers.it.to_host(ref.digest)
    assert (tier(tiers, ref), tiers.it.count_on_device) == ("host", 0)


def test_sent_to_the_disk_it_leaves_both_and_can_come_back(
    make: Callable[..., Tiers], reads: Counter[str]
) -> None:
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(4, 0)
    tiers.fetched(ref)
    assert tiers.use(ref)
    tiers.it.to_disk(ref.digest)
    tiers.it.release(ref.digest)
    assert tier(tiers, ref) == "disk"
    tiers.fetched(ref)
    assert tiers.use(ref)
    assert reads[ref.digest] == 2


def test_a_deleted_delta_loses_its_pin(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(4, 0)
    tiers.fetched(ref)
    tiers.it.pin(ref.digest, "host")
    tiers.it.drop(ref.digest)
    tiers.fetched(ref)
    assert tiers.it.refuses_pin(ref.digest, "host") is None
    tiers.it.to_disk(ref.digest)
    assert tier(tiers, ref) == "disk"


def test_room_kept_for_a_row_that_left_is_known_to_be_free_in_the_next_step(
    make: Callable[..., Tiers],
) -> None:
    """So that the loop, with nothing to run, takes that step and does not go to sleep."""
    tiers = make(device_bytes=size_of(make, 16))
    big, first, second = tiers.ref(16, 0), tiers.ref(2, 1), tiers.ref(2, 2)
    tiers.fetched(big, first, second)
    assert tiers.use(first)
    assert not tiers.use(big)
    assert not tiers.it.reserved_for_nobody
    tiers.it.release(first.digest)
    tiers.it.collect()  # the large one's row has left
    assert not tiers.use(second)
    assert tiers.it.reserved_for_nobody
    tiers.it.collect()
    assert tiers.use(second)


def test_sent_to_the_disk_while_it_waits_for_room_it_is_read_again(make: Callable[..., Tiers]) -> None:
    tiers = make(device_bytes=size_of(make, 16))
    big, small = tiers.ref(16, 0), tiers.ref(2, 1)
    tiers.fetched(big, small)
    assert tiers.use(small)
    assert not tiers.use(big)
    tiers.it.to_disk(big.digest)
    tiers.it.collect()
    assert not tiers.use(big)
    tiers.woken.get(timeout=30)
    tiers.it.release(small.digest)
    tiers.it.collect()
    assert tiers.use(big)


def test_many_who_ask_at_once_make_one_read_off_their_own_thread(
    make: Callable[..., Tiers], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(4, 0)
    held, threads = threading.Event(), []
    lowered = Loaders._lowered

    def slow(self: Loaders, ref: DeltaRef) -> object:
        threads.append(threading.current_thread())
        assert held.wait(30)
        return lowered(self, ref)

    monkeypatch.setattr(Loaders, "_lowered", slow)
    for _ in range(50):
        assert tiers.it.resident(ref) is None  # and does not wait
    held.set()
    tiers.woken.get(timeout=30)
    assert not tiers.it.collect()
    assert tiers.use(ref)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize("on_host", [1, 2, 6])
def test_rows_whose_deltas_do_not_fit_together_do_not_read_them_again_and_again(
    make: Callable[..., Tiers], reads: Counter[str], on_host: int
) -> None:
    """Twelve rows of six deltas, room for two: each row runs ten steps; all that wait ask in every step."""
    size = size_of(make, 4)
    reads.clear()
    tiers = make(device_bytes=2 * size, host_bytes=on_host * size)
    refs = [tiers.ref(4, seed) for seed in range(6)]
    waiting, running = [*refs, *refs], list[tuple[int, DeltaRef]]()
    for ref in waiting:
        tiers.it.prefetch(ref)
    steps = taken = 0
    while waiting or running:
        steps += 1
        while taken < sum(
            reads.values()
        ):  # the loaders are as fast as can be: all is read before the next step
            tiers.woken.get(timeout=30)
            taken += 1
        assert not tiers.it.collect()
        started = [ref for ref in waiting if tiers.use(ref)]
        for ref in started:
            waiting.remove(ref)
        for left, ref in running:
            if not left:
                tiers.it.release(ref.digest)
        running = [(left - 1, ref) for left, ref in running if left] + [(10, ref) for ref in started]
    assert steps <= 60
    # once when its row comes; and where the host could not keep it, its own read and one beside it
    assert sum(reads.values()) <= (6 if on_host == 6 else 6 + 2 * 6)
