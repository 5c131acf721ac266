"""Rows that wait for a slot, in a fair order over tenants: a virtual token counter.

Each tenant's counter says how many tokens it has been served, divided by its weight; the tenant with the
lowest counter goes first, and within a tenant the oldest row. A tenant that comes back after a pause is
lifted to the lowest counter among the active, so that nobody saves up credit by being idle.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the queue must know of a row; ``uncomputed`` counts the tokens that it still needs."""

    @property
    def id(self) -> int: ...

    @property
    def tenant(self) -> str: ...

    @property
    def uncomputed(self) -> int: ...


Row = TypeVar("Row", bound=Waiting)


class FairQueue(Generic[Row]):
    """Waiting rows by tenant, and every active tenant's counter. A tenant is active while it has any row."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._waiting: dict[str, dict[int, Row]] = {}
        self._rows: Counter[str] = Counter()  # waiting and running rows of each active tenant
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._waiting.values())

    def __iter__(self) -> Iterator[Row]:
        """All waiting rows, each tenant's in order of arrival."""
        for rows in self._waiting.values():
            yield from rows.values()

    def served(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._served.get(tenant, 0.0)

    def push(self, seq: Row) -> None:
        """Put a new row last in its tenant's line, lifting the counter of a tenant that was idle."""
        if not self._rows[seq.tenant]:
            floor = min((self._served[tenant] for tenant in self._rows if tenant != seq.tenant), default=0.0)
            self._served[seq.tenant] = max(self._served.get(seq.tenant, 0.0), floor)
        self._rows[seq.tenant] += 1
        self._waiting.setdefault(seq.tenant, {})[seq.id] = seq

    def put_back(self, seq: Row) -> None:
        """Put a row that had started first in its tenant's line."""
        self._waiting[seq.tenant] = {seq.id: seq} | self._waiting.get(seq.tenant, {})

    def remove(self, seq: Row) -> None:
        """Take a waiting row out, because it ends or because it starts; an ended one also needs ``leave``."""
        rows = self._waiting[seq.tenant]
        del rows[seq.id]
        if not rows:
            del self._waiting[seq.tenant]

    def leave(self, tenant: str) -> None:
        """One of the tenant's rows has ended."""
        self._rows[tenant] -= 1
        if self._rows[tenant]:
            return
        del self._rows[tenant]
        # An idle tenant's counter matters only as long as it is above what it would be lifted to anyway.
        floor = min((self._served[active] for active in self._rows), default=float("inf"))
        for idle in [name for name in self._served if name not in self._rows and self._served[name] <= floor]:
            del self._served[idle]

    def charge(self, tenant: str, tokens: int) -> None:
        """Account for tokens the tenant is being served."""
        self._served[tenant] += tokens / self._weights.get(tenant, 1.0)

    def offer(self, take: Callable[[Row], bool | None], backlog: Mapping[str, int]) -> None:
        """Offer waiting rows in fair order until ``take`` says stop.

        ``take`` returns True when it has taken the row (it must not touch the queue itself; the row is
        removed here), False to skip the row for now (it keeps its place), None to stop. ``backlog`` counts
        the tokens that running rows of a tenant still have to compute: they weigh as if served, so that one
        tenant does not take every free slot before its counter moves.
        """
        lines = []
        for order, (tenant, rows) in enumerate(self._waiting.items()):
            key = self._served[tenant] + backlog.get(tenant, 0) / self._weights.get(tenant, 1.0)
            lines.append((key, order, tenant, iter(list(rows.values()))))
        heapq.heapify(lines)
        while lines:
            key, order, tenant, rows_left = heapq.heappop(lines)
            for seq in rows_left:
                taken = take(seq)
                if taken is None:
                    return
                if taken:
                    self.remove(seq)
                    key += seq.uncomputed / self._weights.get(tenant, 1.0)
                    heapq.heappush(lines, (key, order, tenant, rows_left))
                    break

    def problems(self, running: Counter[str]) -> Iterator[str]:
        """What is inconsistent, given how many running rows each tenant has."""
        expected = Counter({tenant: len(rows) for tenant, rows in self._waiting.items()}) + running
        if expected != self._rows:
            yield f"rows by tenant are {dict(expected)}, counted as {dict(self._rows)}"
        if any(not rows for rows in self._waiting.values()):
            yield "a tenant without waiting rows has a line"
        if missing := [tenant for tenant in self._rows if tenant not in self._served]:
            yield f"active tenants without a counter: {missing}"
        if not self._rows and self._served:
            yield f"counters kept though nobody is active: {self._served}"
