"""What the next step computes. Pure Python: rows, slots and token budgets; no tensors.

    plan = scheduler.next(ready)      rows that decode, and chunks of prompts
    out = runner.run(plan)
    ... seq.advance(...) for each row, scheduler.finish(seq) for those that ended

A row is admitted when its prompt has room, and some more for what running rows will generate. When they have generated
more than there is room for, one of them goes back to waiting and computes its tokens again later: no row ever fails for
lack of KV.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.engine.chunks import chunks
from server.engine.plan import Plan, PlannedRow
from server.engine.sequence import Sequence
from server.engine.sharing import key_of, share, waits
from server.engine.slots import Held, SlotPool
from server.engine.waiting import FairQueue
from server.errors import ContextTooLong, InvalidRequest, Unavailable

Ready = Callable[[Sequence], int | None]

GROWTH = 32  # tokens: what a row is expected to generate before room must be found for more


class IntegrityError(RuntimeError):
    """The scheduler's books do not add up: a bug, never a user's fault."""


@dataclass(slots=True)
class CacheCounts:
    """Prompt tokens of admitted rows, and how many of them were not computed again."""

    queried: int = 0
    hit: int = 0


class Scheduler:
    """Owns the waiting rows, the running rows, the KV slots and the KV token budget. Not thread-safe.

    ``max_rows`` slots of ``slot_tokens`` tokens each, and of ``source_tokens`` of an encoder's (0: there is none); what
    running rows hold together stays within ``kv_tokens``; at most ``prefill_tokens`` prompt tokens a step; at most
    ``max_waiting`` rows wait, each at most ``queue_timeout`` seconds until it begins.

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
        queue_timeout: float = float("inf"),
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
        self._queue: FairQueue[Sequence] = FairQueue(queue_timeout, clock)
        self._running: dict[int, Sequence] = {}  # in order of admission
        self._pool = SlotPool(max_rows)
        self.cache = CacheCounts()
        self.preemptions = 0

    @property
    def rows_running(self) -> int:
        return len(self._running)

    @property
    def rows_waiting(self) -> int:
        return len(self._known) - len(self._running)

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens that running rows hold, or will once their prompts are computed."""
        return sum(seq.held for seq in self._running.values())

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

    def expire(self) -> list[Sequence]:
        """Take out the rows that have waited too long without ever having begun; the caller answers them."""
        expired = self._queue.expired()
        for seq in expired:
            self._forget(seq)
        return expired

    def next_expiry(self) -> float | None:
        """In how many seconds :meth:`expire` may have something to do; None: never as things are."""
        return self._queue.next_expiry()

    def next(self, ready: Ready) -> Plan:
        """Admit what fits, then plan one step: every decode row, and prompt chunks within the budget.

        ``ready`` says how many KV tokens a row's delta puts before it (0 for base rows) once the delta is
        resident, or None while it is loading (it may start the load). It promises nothing for later: a row in
        ``admitted`` must have its delta held before the next load or eviction.
        """
        plan = Plan([], 0)
        self._preempt(plan)
        self._admit(ready, plan)
        self._pool.shrink(self.kv_tokens - self.kv_tokens_used)
        plan.emptied = self._pool.empty()
        decode = sorted((seq for seq in self._running.values() if seq.decoding), key=_digest)
        filling = [seq for seq in self._running.values() if not seq.decoding and seq.uncomputed]
        counts = chunks(filling, self.prefill_tokens, self._queue.served)
        prefill = sorted((seq for seq in self._running.values() if counts.get(seq.id)), key=_digest)
        for seq in decode:
            plan.rows.append(PlannedRow(seq, seq.computed, 1, samples=seq.remaining > 0))
        for seq in prefill:
            count = counts[seq.id]
            samples = count == seq.uncomputed and seq.remaining > 0
            plan.rows.append(PlannedRow(seq, seq.computed, count, samples))
        plan.decode_rows = len(decode)
        for row in plan.rows:
            self._queue.charge(row.seq.tenant, row.seq.charge(row.count))
        return plan

    def check_integrity(self) -> None:
        """Raise IntegrityError if any invariant is broken. For idle moments and tests, between steps."""
        problems = list(self._problems())
        if problems:
            raise IntegrityError("; ".join(problems))

    def _admit(self, ready: Ready, plan: Plan) -> None:
        """Give slots to waiting rows in fair order.

        A row whose delta is not there is skipped and keeps its place; the first such row is asked about in each step,
        so that its delta is the next to find room. A ready row that does not fit stops admission: letting smaller rows
        pass it for ever would starve it, and running rows end by themselves.
        """
        if not self.rows_waiting:
            return
        if not len(self._pool):
            if self._queue.favoured is not None:
                ready(self._queue.favoured)
            return
        loading: set[str] = set()  # ask once a call about each delta
        wanted = sum(_expected(seq) for seq in self._running.values())

        def take(seq: Sequence) -> bool | None:
            nonlocal wanted
            if not len(self._pool):
                return None
            if seq.digest in loading or waits(seq):
                return False
            prefix = ready(seq)
            if prefix is None:
                loading.add(seq.digest)
                self._queue.favour(seq)
                return False
            room = self.slot_tokens - prefix - len(seq.prompt)
            if room < 1:
                plan.rejected.append(seq)
                return False
            seq.prefix, seq.limit = prefix, min(seq.sampling.max_tokens, room)
            if wanted + _expected(seq) > self.kv_tokens:
                return None
            shared = share(seq, self._running.values(), self._pool)
            seq.behind = shared.behind
            if seq.behind is not None:
                return False
            wanted += _expected(seq)
            seq.slot = self._pool.take(shared.slot, shared.count)
            seq.copied_from, seq.computed = shared.slot, shared.count
            self._running[seq.id] = seq
            if seq.started is None:
                seq.started = self._clock()
                seq.cached = seq.charged = shared.count
                self.cache.queried += len(seq.prompt)
                self.cache.hit += seq.cached
            plan.admitted.append(seq)
            return True

        backlog: Counter[str] = Counter()
        for seq in self._running.values():
            backlog[seq.tenant] += seq.uncomputed
        self._queue.offer(take, backlog)
        for seq in plan.rejected:
            self._forget(seq)

    def _preempt(self, plan: Plan) -> None:
        """Takes rows out until the others have room for a step.

        First comes whoever has been served most, of its rows the one of the highest priority number, of these the newest.
        """
        over = self.kv_tokens_used - self.kv_tokens
        while over > 0:
            newest = reversed(list(self._running.values()))
            seq = max(newest, key=lambda seq: (self._queue.served(seq.tenant), seq.priority))
            over -= seq.held
            self._release(seq, sound=True)
            seq.computed, seq.copied_from = 0, None
            self._queue.put_back(seq)
            self.preemptions += 1
            plan.preempted.append(seq)

    def _forget(self, seq: Sequence, *, sound: bool = True) -> None:
        del self._known[seq.id]
        if seq.slot is None:
            self._queue.remove(seq)
        else:
            self._release(seq, sound=sound)
        self._queue.leave(seq.tenant)

    def _release(self, seq: Sequence, *, sound: bool) -> None:
        """Give back a running row's slot; what it computed stays there for others, if it is ``sound``."""
        if seq.slot is None:
            raise IntegrityError(f"row {seq.id} has no slot to give back")
        del self._running[seq.id]
        held = Held(key_of(seq), seq.tokens(0, seq.computed)) if sound and not seq.source else None
        self._pool.put(seq.slot, seq.prefix + seq.computed, held)
        seq.slot = None

    def _problems(self) -> Iterator[str]:
        held = [seq.slot for seq in self._running.values()]
        if sorted([*self._pool, *(slot for slot in held if slot is not None)]) != list(range(self.max_rows)):
            yield f"slots do not add up: free {[*self._pool]}, held {held}"
        for seq in self._running.values():
            tokens = seq.prefix + seq.length
            if not (0 <= seq.computed <= seq.length and tokens + max(0, seq.remaining) <= self.slot_tokens):
                yield f"row {seq.id}: computed {seq.computed}, length {seq.length}, remaining {seq.remaining}"
        waiting = list(self._queue)
        if any(seq.slot is not None for seq in waiting):
            yield "a waiting row holds a slot"
        if {seq.id for seq in waiting} ^ self._running.keys() != self._known.keys():
            yield "waiting and running rows are not the known rows"
        yield from self._queue.problems(Counter(seq.tenant for seq in self._running.values()))


def _digest(seq: Sequence) -> str:
    return seq.digest


def _expected(seq: Sequence) -> int:
    """KV tokens to have ready for a row: what it holds, and what it is likely to generate before others end."""
    return seq.held + min(max(0, seq.remaining), GROWTH)
