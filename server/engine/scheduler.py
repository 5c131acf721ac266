"""What the next step computes. Pure Python: rows, slots and token budgets; no tensors.

    plan = scheduler.next(ready)      rows that decode, and chunks of prompts
    out = runner.run(plan)
    ... seq.advance(...) for each row, scheduler.finish(seq) for those that ended

A row is admitted with everything it can ever need reserved (prefix + prompt + output limit), so a running row
never fails for lack of KV.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from server.engine.sequence import Sequence
from server.engine.sharing import key_of, share, waits
from server.engine.slots import Held, SlotPool
from server.engine.waiting import FairQueue
from server.errors import ContextTooLong, InvalidRequest, Unavailable

Ready = Callable[[Sequence], int | None]


class IntegrityError(RuntimeError):
    """The scheduler's books do not add up: a bug, never a user's fault."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Compute ``count`` tokens of ``seq`` from ``start`` on and, if ``samples``, choose the next one."""

    seq: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class Plan:
    """One step.

    ``rows`` are decode rows (count 1), then prefill chunks; within each of the two, rows of one delta are
    adjacent, base rows first, otherwise in order of admission. ``admitted`` got a slot in this call and
    ``rejected`` turned out not to fit behind their delta's prefix: they are gone from the scheduler and must
    be answered with an error. The memory of ``emptied`` slots may be given back once the admitted have begun.
    """

    rows: list[PlannedRow]
    decode_rows: int
    admitted: list[Sequence] = field(default_factory=list)
    rejected: list[Sequence] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)

    @property
    def composition(self) -> tuple[tuple[int, int], ...]:
        """Hashable; equal for plans of equally many tokens of the same rows in the same order."""
        return tuple((row.seq.id, row.count) for row in self.rows)

    @property
    def tokens(self) -> int:
        """How many tokens the step computes."""
        return sum(row.count for row in self.rows)


@dataclass(slots=True)
class CacheCounts:
    """Prompt tokens of admitted rows, and how many of them were not computed again."""

    queried: int = 0
    hit: int = 0


class Scheduler:
    """Owns the waiting rows, the running rows, the KV slots and the KV token budget. Not thread-safe.

    ``max_rows`` slots of ``slot_tokens`` tokens each, and of ``source_tokens`` of an encoder's (0: there is none); all
    reservations together stay within ``kv_tokens``; at most ``prefill_tokens`` prompt tokens a step; at most
    ``max_waiting`` rows wait. ``weights`` are tenants' shares (1.0 where absent).

    A source is read whole in the step in which its row begins, and counts as prompt tokens; one that is longer than a
    step's budget is read by itself.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        slot_tokens: int,
        kv_tokens: int,
        prefill_tokens: int,
        max_waiting: int,
        source_tokens: int = 0,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_rows, slot_tokens, prefill_tokens, max_waiting) < 1:
            raise ValueError("every size of the scheduler must be at least 1")
        if kv_tokens < slot_tokens + source_tokens:
            raise ValueError(
                f"a KV budget of {kv_tokens} tokens cannot hold one slot of {slot_tokens} and a source of "
                f"{source_tokens}"
            )
        self.max_rows = max_rows
        self.slot_tokens = slot_tokens
        self.kv_tokens = kv_tokens
        self.prefill_tokens = prefill_tokens
        self.max_waiting = max_waiting
        self.source_tokens = source_tokens
        self._clock = clock
        self._known: dict[int, Sequence] = {}
        self._queue: FairQueue[Sequence] = FairQueue(weights)
        self._running: dict[int, Sequence] = {}  # in order of admission
        self._pool = SlotPool(max_rows)
        self._kv_used = 0
        self.cache = CacheCounts()

    @property
    def rows_running(self) -> int:
        return len(self._running)

    @property
    def rows_waiting(self) -> int:
        return len(self._known) - len(self._running)

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved by running rows."""
        return self._kv_used

    def waiting(self) -> Iterator[Sequence]:
        """The waiting rows, for prefetching their deltas. Do not add or remove rows while iterating."""
        return iter(self._queue)

    def running(self) -> Iterator[Sequence]:
        """The running rows in order of admission. Do not add or remove rows while iterating."""
        return iter(self._running.values())

    def add(self, seq: Sequence) -> None:
        """Accept a row. Raises InvalidRequest, ContextTooLong, or Unavailable when too many rows wait."""
        if seq.id in self._known:
            raise ValueError(f"row {seq.id} is already known")
        if not seq.prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if seq.limit < 0:
            raise InvalidRequest("max_tokens must not be negative", param="max_tokens")
        if len(seq.prompt) >= self.slot_tokens:
            raise ContextTooLong(
                f"the prompt has {len(seq.prompt)} tokens; the context holds {self.slot_tokens}, "
                "at least one of them for the answer",
                param="prompt",
            )
        if self.source_tokens and not seq.source:
            raise InvalidRequest("the prompt is empty: the encoder has nothing to read", param="prompt")
        if len(seq.source) > self.source_tokens:
            raise ContextTooLong(
                f"the source has {len(seq.source)} tokens; the encoder reads at most {self.source_tokens}",
                param="prompt",
            )
        if self.rows_waiting >= self.max_waiting:
            raise Unavailable(f"{self.max_waiting} requests are waiting already; try again later")
        self._known[seq.id] = seq
        self._queue.push(seq)

    def cancel(self, row_id: int) -> Sequence | None:
        """Forget a row, waiting or running. None if it is not here (any more)."""
        seq = self._known.get(row_id)
        if seq is not None:
            self._forget(seq)
        return seq

    def finish(self, seq: Sequence, *, sound: bool = True) -> None:
        """A row has ended: its slot and its reservation are free again. Nobody uses what an un``sound`` one computed."""
        if self._known.get(seq.id) is not seq:
            raise ValueError(f"row {seq.id} is not in the scheduler")
        self._forget(seq, sound=sound)

    def fail_waiting(self, digest: str) -> list[Sequence]:
        """Take out the waiting rows of a delta that cannot be loaded; the caller answers them."""
        failed = [seq for seq in self._queue if seq.digest == digest]
        for seq in failed:
            self._forget(seq)
        return failed

    def next(self, ready: Ready) -> Plan:
        """Admit what fits, then plan one step: every decode row, and prompt chunks within the budget.

        ``ready`` says how many KV tokens a row's delta puts before it (0 for base rows) once the delta is
        resident, or None while it is loading (it may start the load). It promises nothing for later: a row in
        ``admitted`` must have its delta held before the next load or eviction.
        """
        plan = Plan([], 0)
        self._admit(ready, plan)
        decode = sorted((seq for seq in self._running.values() if seq.decoding), key=_digest)
        counts = self._chunks([seq for seq in self._running.values() if not seq.decoding and seq.uncomputed])
        prefill = sorted((seq for seq in self._running.values() if counts.get(seq.id)), key=_digest)
        for seq in decode:
            plan.rows.append(PlannedRow(seq, seq.computed, 1, samples=seq.remaining > 0))
        for seq in prefill:
            count = counts[seq.id]
            samples = count == seq.uncomputed and seq.remaining > 0
            plan.rows.append(PlannedRow(seq, seq.computed, count, samples))
        plan.decode_rows = len(decode)
        for row in plan.rows:
            self._queue.charge(row.seq.tenant, row.count + row.seq.unread)
        return plan

    def check_integrity(self) -> None:
        """Raise IntegrityError if any invariant is broken. For idle moments and tests, between steps."""
        problems = list(self._problems())
        if problems:
            raise IntegrityError("; ".join(problems))

    def _admit(self, ready: Ready, plan: Plan) -> None:
        """Give slots to waiting rows in fair order.

        A row whose delta is loading is skipped and keeps its place. A ready row that does not fit stops
        admission: letting smaller rows pass it for ever would starve it, and running rows end by themselves.
        (Preemption belongs here later: ``_release`` a running row, set its ``computed`` to 0, and put it
        back at the front of its tenant's line.)
        """
        if not len(self._pool) or not self.rows_waiting:
            return
        loading: set[str] = set()  # ask once a call about each delta

        def take(seq: Sequence) -> bool | None:
            if not len(self._pool):
                return None
            if seq.digest in loading or waits(seq):
                return False
            prefix = ready(seq)
            if prefix is None:
                loading.add(seq.digest)
                return False
            room = self.slot_tokens - prefix - len(seq.prompt)
            if room < 1:
                plan.rejected.append(seq)
                return False
            limit = min(seq.sampling.max_tokens, room)
            reserved = prefix + len(seq.prompt) + limit + len(seq.source)
            if self._kv_used + reserved > self.kv_tokens:
                return None
            shared = share(seq, self._running.values(), self._pool)
            seq.behind = shared.behind
            if seq.behind is not None:
                return False
            seq.prefix, seq.limit, seq.slot = prefix, limit, self._pool.take(shared.slot, shared.count)
            seq.copied_from, seq.computed, seq.cached = shared.slot, shared.count, shared.count
            self.cache.queried += len(seq.prompt)
            self.cache.hit += seq.cached
            self._kv_used += reserved
            self._running[seq.id] = seq
            if seq.started is None:
                seq.started = self._clock()
            plan.admitted.append(seq)
            return True

        backlog: Counter[str] = Counter()
        for seq in self._running.values():
            backlog[seq.tenant] += seq.uncomputed
        self._queue.offer(take, backlog)
        for seq in plan.rejected:
            self._forget(seq)
        self._pool.shrink(self.kv_tokens - self._kv_used)
        plan.emptied = self._pool.empty()

    def _chunks(self, rows: list[Sequence]) -> dict[int, int]:
        """How many tokens of each prefilling row to compute, by row id.

        Half of the budget goes by fairness (tenant's counter, then order of admission), which alone
        guarantees that every row gets on; the rest goes to the rows with the least left, so that a short
        prompt need not wait for a long one.
        """
        counts: dict[int, int] = {}
        fair = sorted(rows, key=lambda seq: self._queue.served(seq.tenant))
        left = _share((seq for seq in fair if not seq.unread), (self.prefill_tokens + 1) // 2, counts)
        left = _begin((seq for seq in fair if seq.unread), left + self.prefill_tokens // 2, counts)
        short = sorted((seq for seq in rows if not seq.unread or seq.id in counts), key=_uncomputed)
        _share(short, left, counts)
        return counts

    def _forget(self, seq: Sequence, *, sound: bool = True) -> None:
        del self._known[seq.id]
        if seq.slot is None:
            self._queue.remove(seq)
        else:
            self._release(seq, sound=sound)
        self._queue.leave(seq.tenant)

    def _release(self, seq: Sequence, *, sound: bool) -> None:
        """Give back a running row's slot and reservation; what it computed stays there for others, if it is ``sound``."""
        if seq.slot is None:
            raise IntegrityError(f"row {seq.id} has no slot to give back")
        del self._running[seq.id]
        self._kv_used -= seq.reserved
        held = (
            Held(key_of(seq), seq.tokens(0, seq.computed), seq.prefix) if sound and not seq.source else None
        )
        self._pool.put(seq.slot, seq.prefix + seq.computed, held)
        seq.slot = None

    def _problems(self) -> Iterator[str]:
        held = [seq.slot for seq in self._running.values()]
        if sorted([*self._pool, *(slot for slot in held if slot is not None)]) != list(range(self.max_rows)):
            yield f"slots do not add up: free {[*self._pool]}, held {held}"
        if self._kv_used != sum(seq.reserved for seq in self._running.values()):
            yield f"{self._kv_used} KV tokens counted, not what running rows reserve"
        if self._kv_used > self.kv_tokens:
            yield f"{self._kv_used} KV tokens reserved of {self.kv_tokens}"
        for seq in self._running.values():
            if not (
                0 <= seq.computed <= seq.length
                and seq.prefix + seq.length <= seq.reserved - len(seq.source) <= self.slot_tokens
            ):
                yield f"row {seq.id}: computed {seq.computed}, length {seq.length}, reserved {seq.reserved}"
        waiting = list(self._queue)
        if any(seq.slot is not None for seq in waiting):
            yield "a waiting row holds a slot"
        if {seq.id for seq in waiting} ^ self._running.keys() != self._known.keys():
            yield "waiting and running rows are not the known rows"
        yield from self._queue.problems(Counter(seq.tenant for seq in self._running.values()))


def _digest(seq: Sequence) -> str:
    return seq.digest


def _uncomputed(seq: Sequence) -> int:
    return seq.uncomputed


def _begin(rows: Iterable[Sequence], budget: int, counts: dict[int, int]) -> int:
    """Lets rows begin in order, with their whole source and one token each, until one does not fit; returns what is left.

    The first begins in any case, and the first that does not fit ends it, so that none is passed over for ever.
    """
    began = False
    for seq in rows:
        if began and seq.unread + 1 > budget:
            break
        began = True
        counts[seq.id] = 1
        budget -= seq.unread + 1
    return budget


def _share(rows: Iterable[Sequence], budget: int, counts: dict[int, int]) -> int:
    """Hand ``budget`` tokens to rows in order, adding to ``counts``; returns what nobody needed."""
    for seq in rows:
        if budget <= 0:
            break
        given = counts.get(seq.id, 0)
        count = min(budget, seq.uncomputed - given)
        if count:
            counts[seq.id] = given + count
            budget -= count
    return budget
