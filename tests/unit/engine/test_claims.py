"""Who gets room on the device when there is too little: a claim, its end, and who gives way; then whole traffic."""

from __future__ import annotations

import random
from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltas import methods
from deltas.bank import PackedDelta
from deltas.pack import pack
from server.engine.claims import PATIENCE, Candidate, Claims
from server.engine.residency import Residency
from server.engine.scheduler import Plan
from server.engine.sequence import Sequence
from server.types import DeltaRef
from tests.unit.engine.scheduling import make, row
from tests.unit.engine.tiers import SPEC, lora


def overdue(claims: Claims, digest: str) -> None:
    while not claims.overdue:
        claims.begin_step()
        assert claims.allow(digest)
        claims.wait(digest)


def test_others_take_no_room_while_one_waits_for_it() -> None:
    claims = Claims()
    assert claims.allow("large")
    claims.wait("large")
    assert not claims.allow("small")
    claims.begin_step()
    assert not claims.allow("small")
    assert claims.allow("large")


def test_a_claim_that_nobody_upholds_ends() -> None:
    claims = Claims()
    claims.wait("large")
    claims.begin_step()
    assert claims.unasked
    claims.begin_step()
    assert not claims.unasked
    assert claims.allow("small")


def test_who_was_refused_first_comes_next() -> None:
    """Also before those that are asked for later in the step in which the claim is settled."""
    claims = Claims()
    claims.wait("a")
    claims.begin_step()
    assert [claims.allow(digest) for digest in ("b", "c", "a")] == [False, False, True]
    claims.settle()
    assert claims.holder == "b"
    assert not claims.allow("d")
    claims.begin_step()
    assert claims.holder == "b"  # it was asked for in the step before


def test_patience_ends_and_the_least_used_give_way_and_stay_away() -> None:
    claims = Claims()
    overdue(claims, "new")
    claims.close([Candidate("busy", 10, 5), Candidate("used", 10, 2), Candidate("idle", 10, 1)], 15)
    assert claims.closed == {"idle", "used"}
    claims.close([Candidate("busy", 10, 1), Candidate("used", 10, 2), Candidate("idle", 10, 1)], 15)
    assert claims.closed == {"idle", "used"}
    claims.settle()
    assert not claims.closed
    assert not claims.overdue


def test_a_step_counts_once_however_often_it_is_asked_in_it() -> None:
    claims = Claims()
    for _ in range(2 * PATIENCE):
        claims.wait("new")
    assert not claims.overdue


def packed(rank: int) -> PackedDelta:
    patches = methods.lower_sum([(lora(rank, 0), 1.0)], SPEC, None)
    return pack(patches, SPEC, torch.float32)


SIZES = [packed(rank) for rank in (1, 2, 4)]


class Stepped:
    """Scheduler and residency as the engine's loop runs them; reading a delta takes some steps."""

    def __init__(self, *, device: int, host: int, slots: int, delay: int) -> None:
        self.scheduler = make(max_rows=slots, kv_tokens=64 * slots)
        self.tiers = Residency(
            SPEC,
            torch.float32,
            torch.device("cpu"),
            device_bytes=device,
            host_bytes=host,
            pinned_share=0.5,
            finish=lambda delta: delta,
            forget=lambda delta: None,
            wake=lambda: None,
        )
        self.tiers._loaders.load = self.read  # type: ignore[method-assign]
        self.delay = delay
        self.reading: list[tuple[int, str]] = []
        self.steps = 0
        self.begun: dict[int, int] = {}

    def read(self, ref: DeltaRef) -> None:
        self.reading.append((self.steps + self.delay, ref.digest))

    def add(self, seq: Sequence) -> None:
        self.scheduler.add(seq)
        if seq.delta is not None:
            self.tiers.prefetch(seq.delta)

    def ready(self, seq: Sequence) -> int | None:
        return 0 if seq.delta is None or self.tiers.resident(seq.delta) is not None else None

    def step(self) -> Plan:
        for due, digest in list(self.reading):
            if due <= self.steps:
                self.reading.remove((due, digest))
                self.tiers._loaded(digest, SIZES[int(digest.partition("-")[0])])
        assert not self.tiers.collect()
        plan = self.scheduler.next(self.ready)
        for seq in plan.preempted:
            if seq.delta is not None:
                self.tiers.release(seq.digest)
        for seq in plan.admitted:
            self.begun.setdefault(seq.id, self.steps)
            if seq.delta is not None:
                self.tiers.acquire(seq.digest)
        users = Counter(seq.digest for seq in self.scheduler.running() if seq.delta is not None)
        held = self.tiers._on_device
        assert users == {d: r.references for d, r in held.items() if r.references}
        assert self.tiers.bytes_on_device == sum(r.delta.nbytes for r in held.values())
        assert self.tiers.bytes_on_host == sum(delta.nbytes for delta in self.tiers._on_host.values())
        assert self.tiers.bytes_on_device <= self.tiers._device_bytes
        for planned in plan.rows:
            seq = planned.seq
            seq.advance(planned.count, 7 if planned.samples else None)
            if not seq.remaining:
                self.scheduler.finish(seq)
                if seq.delta is not None:
                    self.tiers.release(seq.digest)
        self.steps += 1
        self.scheduler.check_integrity()
        return plan


def test_a_delta_begins_though_rows_of_others_overlap_for_ever() -> None:
    """Two deltas fill the device, and each always has a running row; a third comes."""
    size = SIZES[0].nbytes
    engine = Stepped(device=2 * size, host=1 << 20, slots=6, delay=1)
    for n in range(40):
        engine.add(row(4, 8 + n % 3, "busy", f"0-{n % 2}"))
        engine.step()
    late = row(4, 4, "late", "0-late")
    engine.add(late)
    for n in range(PATIENCE + 40):
        if engine.scheduler.rows_waiting < 20:
            engine.add(row(4, 8 + n % 3, "busy", f"0-{n % 2}"))
        engine.step()
    assert late.id in engine.begun


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    fits=st.sampled_from([4, 5, 8, 12]),
    host=st.sampled_from([0, 4, 12, 1000]),
    slots=st.integers(1, 6),
    delay=st.integers(0, 4),
    kinds=st.integers(2, 12),
    tenants=st.integers(1, 3),
)
def test_every_row_begins_within_a_bound(
    seed: int, fits: int, host: int, slots: int, delay: int, kinds: int, tenants: int
) -> None:
    """Under a flood that never ends, over more deltas than fit, of three sizes, some of them hardly ever without a row."""
    chance = random.Random(seed)
    unit = SIZES[0].nbytes
    engine = Stepped(device=fits * unit, host=host * unit, slots=slots, delay=delay)
    digests = [f"{chance.choice([0, 0, 1, 2])}-{n}" for n in range(kinds)]
    popular = [1 / (n + 1) for n in range(kinds)]

    def flood() -> Sequence:
        digest = chance.choice([None, *chance.choices(digests, popular, k=4)])
        tenant = f"t{chance.randrange(tenants)}"
        return row(chance.randint(1, 8), chance.randint(1, 12), tenant, digest)

    watched: list[Sequence] = []
    for step in range(700):
        while engine.scheduler.rows_waiting < 12:
            engine.add(seq := flood())
            if step < 150:
                watched.append(seq)
        engine.step()
    assert all(seq.id in engine.begun for seq in watched)
