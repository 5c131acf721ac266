"""Rows, schedulers and a stand-in for the step loop, for the scheduler's tests: no tensors."""

from __future__ import annotations

from collections import Counter
from itertools import count

from server.engine.plan import Plan
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import InvalidRequest, Unavailable
from server.types import DeltaRef, SamplingParams

_ids = count()


def row(
    prompt: int,
    max_tokens: int = 4,
    tenant: str = "a",
    digest: str | None = None,
    *,
    weight: float = 1.0,
    priority: int = 0,
    arrived: float = 0.0,
) -> Sequence:
    """A row whose prompt begins like no other's."""
    number = next(_ids)
    return Sequence(
        number,
        tenant,
        [number, *[1] * (prompt - 1)][:prompt],
        SamplingParams(max_tokens=max_tokens),
        None if digest is None else DeltaRef(digest, f"{digest}.safetensors"),
        weight,
        priority,
        arrived=arrived,
    )


def make(**changes: object) -> Scheduler:
    defaults: dict[str, object] = {
        "max_rows": 4,
        "slot_tokens": 64,
        "kv_tokens": 256,
        "prefill_tokens": 16,
        "max_waiting": 100,
    }
    return Scheduler(**(defaults | changes))  # type: ignore[arg-type]


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
        for seq in plan.admitted:
            self.next_token[seq.id] = seq.computed  # again, for one that was preempted
        self.check(plan, decoding - {seq.id for seq in plan.preempted})
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
