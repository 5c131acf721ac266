"""Rows that wait for a slot, in a fair order over tenants: a virtual token counter.

Each tenant's counter says how many tokens it has been served, divided by its weight; the tenant with the
lowest counter goes first. Within a tenant the row of the lowest priority number goes first, and of those the oldest.
A tenant that comes back after a pause is lifted to the lowest counter among the active, so that nobody saves up credit
by being idle.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the queue must know of a row; ``uncomputed`` counts the tokens that it still needs.

    ``weight`` is its tenant's; ``arrived`` is of the queue's clock.
    """

    @property
    def id(self) -> int: ...

    @property
    def tenant(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def priority(self) -> int: ...

    @property
    def arrived(self) -> float: ...

    @property
    def uncomputed(self) -> int: ...


Row = TypeVar("Row", bound=Waiting)


class FairQueue(Generic[Row]):
    """Waiting rows by tenant, and every active tenant's counter. A tenant is active while it has any row.

    A tenant's weight is what its newest row says. Rows that have waited longer than ``timeout`` seconds without ever
    having been taken are ``expired``.
    """

    def __init__(self, timeout: float = float("inf"), clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self._waiting: dict[str, list[Row]] = {}  # each tenant's line, by place
        self._places: dict[int, tuple[int, int]] = {}  # by row: its priority, and its number among equals
        self._numbers = count(1)
        self._fresh: dict[int, Row] = {}  # those that were never taken, in order of arrival
        self._favoured: Row | None = None
        self._weights: dict[str, float] = {}
        self._rows: Counter[str] = Counter()  # waiting and running rows of each active tenant
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(len(line) for line in self._waiting.values())

    def __iter__(self) -> Iterator[Row]:
        """All waiting rows, each tenant's in the order of its line."""
        for line in self._waiting.values():
            yield from line

    def served(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._served.get(tenant, 0.0)

    def push(self, seq: Row) -> None:
        """Put a new row in its tenant's line, lifting the counter of a tenant that was idle."""
        self._weights[seq.tenant] = seq.weight
        if not self._rows[seq.tenant]:
            floor = min((self._served[tenant] for tenant in self._rows if tenant != seq.tenant), default=0.0)
            self._served[seq.tenant] = max(self._served.get(seq.tenant, 0.0), floor)
        self._rows[seq.tenant] += 1
        self._fresh[seq.id] = seq
        self._line_up(seq, next(self._numbers))

    def put_back(self, seq: Row) -> None:
        """Put a row that had started before all others of its tenant and priority."""
        self._line_up(seq, -next(self._numbers))

    def remove(self, seq: Row) -> None:
        """Take a waiting row out, because it ends or because it starts; an ended one also needs ``leave``."""
        line = self._waiting[seq.tenant]
        del line[bisect_left(line, self._places[seq.id], key=self._place)]
        if not line:
            del self._waiting[seq.tenant]
        del self._places[seq.id]
        self._fresh.pop(seq.id, None)
        if self._favoured is seq:
            self._favoured = None

    def leave(self, tenant: str) -> None:
        """One of the tenant's rows has ended."""
        self._rows[tenant] -= 1
        if self._rows[tenant]:
            return
        del self._rows[tenant], self._weights[tenant]
        # An idle tenant's counter matters only as long as it is above what it would be lifted to anyway.
        floor = min((self._served[active] for active in self._rows), default=float("inf"))
        for idle in [name for name in self._served if name not in self._rows and self._served[name] <= floor]:
            del self._served[idle]

    def charge(self, tenant: str, tokens: int) -> None:
        """Account for tokens the tenant is being served."""
        self._served[tenant] += tokens / self._weights[tenant]

    def favour(self, seq: Row) -> None:
        """A row was passed over for want of its delta: offer it before all others until it starts or ends.

        One row at a time is favoured, the first that is passed over. What it waits for is thereby asked for in each
        step, before others can take the room for it.
        """
        if self._favoured is None:
            self._favoured = seq

    @property
    def favoured(self) -> Row | None:
        """The row that is offered first, if there is one."""
        return self._favoured

    def offer(self, take: Callable[[Row], bool | None], backlog: Mapping[str, int]) -> None:
        """Offer waiting rows in fair order, behind a favoured one, until ``take`` says stop.

        ``take`` returns True when it has taken the row (it must not touch the queue itself; the row is
        removed here), False to skip the row for now (it keeps its place), None to stop. ``backlog`` counts
        the tokens that running rows of a tenant still have to compute: they weigh as if served, so that one
        tenant does not take every free slot before its counter moves.
        """
        ahead = Counter(backlog)
        first = self._favoured
        if first is not None:
            taken = take(first)
            if taken is None:
                return
            if taken:
                self.remove(first)
                ahead[first.tenant] += first.uncomputed
        lines = []
        for order, (tenant, line) in enumerate(self._waiting.items()):
            key = self._served[tenant] + ahead[tenant] / self._weights[tenant]
            lines.append((key, order, tenant, iter(list(line))))
        heapq.heapify(lines)
        while lines:
            key, order, tenant, rows_left = heapq.heappop(lines)
            for seq in rows_left:
                if seq is first:
                    continue
                taken = take(seq)
                if taken is None:
                    return
                if taken:
                    self.remove(seq)
                    key += seq.uncomputed / self._weights[tenant]
                    heapq.heappush(lines, (key, order, tenant, rows_left))
                    break

    def expired(self) -> list[Row]:
        """The rows that have waited too long, oldest first; they are still in line."""
        before = self._clock() - self._timeout
        found = []
        for seq in self._fresh.values():
            if seq.arrived > before:
                break
            found.append(seq)
        return found

    def next_expiry(self) -> float | None:
        """In how many seconds a row will have waited too long, if none starts; None if none ever will."""
        oldest = next(iter(self._fresh.values()), None)
        if oldest is None or self._timeout == float("inf"):
            return None
        return max(0.0, oldest.arrived + self._timeout - self._clock())

    def problems(self, running: Counter[str]) -> Iterator[str]:
        """What is inconsistent, given how many running rows each tenant has."""
        expected = Counter({tenant: len(line) for tenant, line in self._waiting.items()}) + running
        if expected != self._rows:
            yield f"rows by tenant are {dict(expected)}, counted as {dict(self._rows)}"
        if any(not line for line in self._waiting.values()):
            yield "a tenant without waiting rows has a line"
        if missing := [tenant for tenant in self._rows if tenant not in self._served]:
            yield f"active tenants without a counter: {missing}"
        if self._weights.keys() != self._rows.keys():
            yield f"weights of {sorted(self._weights)}, active are {sorted(self._rows)}"
        if not self._rows and self._served:
            yield f"counters kept though nobody is active: {self._served}"
        waiting = {seq.id for seq in self}
        if self._places.keys() != waiting or not self._fresh.keys() <= waiting:
            yield "rows have places that are not in line"
        if self._favoured is not None and self._favoured.id not in waiting:
            yield "the favoured row does not wait"

    def _line_up(self, seq: Row, number: int) -> None:
        self._places[seq.id] = (seq.priority, number)
        insort(self._waiting.setdefault(seq.tenant, []), seq, key=self._place)

    def _place(self, seq: Row) -> tuple[int, int]:
        return self._places[seq.id]
