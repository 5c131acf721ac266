"""Which rows an encoder takes in its next step. Pure Python: rows and token budgets; no tensors.

An encoder's row needs one step and leaves nothing behind, so there are no running rows between steps: a step takes
waiting rows in the fair order of ``waiting.py`` until its token budget is full.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.scheduler import IntegrityError
from server.engine.waiting import FairQueue
from server.errors import Unavailable
from server.types import DeltaRef, EncoderInput, Want


@dataclass(slots=True, eq=False)
class EncodeJob:
    """One row to encode, with its delta, and what it shall become.

    ``arrived`` is of the monotonic clock. ``weight`` is its tenant's share; of a tenant's rows the lowest ``priority``
    goes first. ``virtual`` counts the tokens that the delta adds to it; known when the row is taken.
    """

    id: int
    tenant: str
    row: EncoderInput
    delta: DeltaRef | None
    want: Want
    arrived: float
    weight: float = 1.0
    priority: int = 0
    virtual: int = 0

    @property
    def digest(self) -> str:
        """The delta's digest, or the empty string for a base row (which sorts before every digest)."""
        return "" if self.delta is None else self.delta.digest

    @property
    def uncomputed(self) -> int:
        """Tokens that the row costs."""
        return len(self.row.ids) + self.virtual


Ready = Callable[[EncodeJob], int | None]


class Batcher:
    """Owns the waiting rows. Not thread-safe.

    A step has at most ``max_rows`` rows and ``step_tokens`` tokens, except that a longer row goes alone; at most
    ``max_waiting`` rows wait, each at most ``queue_timeout`` seconds.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        step_tokens: int,
        max_waiting: int,
        queue_timeout: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_rows, step_tokens, max_waiting) < 1:
            raise ValueError("every size of the batcher must be at least 1")
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.max_waiting = max_waiting
        self._known: dict[int, EncodeJob] = {}
        self._queue: FairQueue[EncodeJob] = FairQueue(queue_timeout, clock)

    def __len__(self) -> int:
        """The rows that wait."""
        return len(self._known)

    def add(self, job: EncodeJob) -> None:
        """Accept a row. Raises :class:`Unavailable` when too many wait."""
        if job.id in self._known:
            raise ValueError(f"row {job.id} is already known")
        if len(self._known) >= self.max_waiting:
            raise Unavailable(f"{self.max_waiting} requests are waiting already; try again later")
        self._known[job.id] = job
        self._queue.push(job)

    def cancel(self, row_id: int) -> None:
        """Forget a row, if it waits."""
        job = self._known.pop(row_id, None)
        if job is not None:
            self._queue.remove(job)
            self._queue.leave(job.tenant)

    def fail_waiting(self, digest: str) -> list[EncodeJob]:
        """Take out the rows of a delta that cannot be loaded; the caller answers them."""
        failed = [job for job in self._known.values() if job.digest == digest]
        for job in failed:
            self.cancel(job.id)
        return failed

    def expire(self) -> list[EncodeJob]:
        """Take out the rows that have waited too long; the caller answers them."""
        expired = self._queue.expired()
        for job in expired:
            self.cancel(job.id)
        return expired

    def next_expiry(self) -> float | None:
        """In how many seconds :meth:`expire` may have something to do; None: never as things are."""
        return self._queue.next_expiry()

    def next(self, ready: Ready) -> list[EncodeJob]:
        """The rows of the next step, those of one delta adjacent; they do not wait any more.

        ``ready`` says how many tokens a row's delta adds to it (0 for base rows) once the delta is resident, or None
        while it is loading: such a row keeps its place. A row that does not fit the rest of the budget ends the step,
        so that no row is passed over for ever.
        """
        taken: list[EncodeJob] = []
        left = self.step_tokens

        def take(job: EncodeJob) -> bool | None:
            nonlocal left
            if len(taken) == self.max_rows or left <= 0:
                return None
            virtual = ready(job)
            if virtual is None:
                self._queue.favour(job)
                return False
            job.virtual = virtual
            if taken and job.uncomputed > left:
                return None
            left -= job.uncomputed
            taken.append(job)
            return True

        self._queue.offer(take, {})
        for job in taken:
            del self._known[job.id]
            self._queue.charge(job.tenant, job.uncomputed)
        for job in taken:
            self._queue.leave(job.tenant)
        return sorted(taken, key=lambda job: job.digest)

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books do not add up. For idle moments and tests, between steps."""
        problems = list(self._queue.problems(Counter()))
        if {job.id for job in self._queue} != self._known.keys():
            problems.append("the rows in line are not the known rows")
        if problems:
            raise IntegrityError("; ".join(problems))
