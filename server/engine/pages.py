"""Which pages of memory hold which tokens of which slot. Pure Python.

A slot is a list of pages of ``size`` tokens. Slots that begin alike share their full pages; a page that several slots
name is never written to: who must write into it is given a page of its own, and told what to copy.
"""

from __future__ import annotations

from collections.abc import Iterator


class OutOfPages(RuntimeError):
    """More is held than the scheduler's budget allows: a bug, never a user's fault."""


class Pages:
    """``count`` pages of ``size`` tokens, given out to ``slots`` slots as they grow. Not thread-safe."""

    def __init__(self, count: int, size: int, slots: int) -> None:
        self.size = size
        self.of: list[list[int]] = [[] for _ in range(slots)]
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count  # how many slots name a page

    @property
    def free(self) -> int:
        """Pages that no slot names."""
        return len(self._free)

    def cut(self, slot: int, end: int) -> None:
        """What the slot holds from token ``end`` on is lost."""
        held = self.of[slot]
        while len(held) > -(-end // self.size):
            self._release(held.pop())

    def own(self, slot: int, start: int, end: int) -> list[tuple[int, int]]:
        """Gives the slot pages up to token ``end``, those from ``start`` on for itself alone.

        Returns the pages whose content has to be copied, as (from, to), in order: a page that the slot shared. Raises
        :class:`OutOfPages`.
        """
        held = self.of[slot]
        copies: list[tuple[int, int]] = []
        for i in range(start // self.size, len(held)):
            if i * self.size < end and self._users[held[i]] > 1:
                new = self._take()
                copies.append((held[i], new))
                self._release(held[i])
                held[i] = new
        while len(held) * self.size < end:
            held.append(self._take())
        return copies

    def share(self, source: int, slot: int, length: int) -> tuple[int, int] | None:
        """An empty slot begins with ``length`` tokens of another: shares its full pages.

        Returns the page that holds the rest and the slot's own, to copy there; None where nothing is left over.
        """
        if self.of[slot]:
            raise ValueError(f"slot {slot} holds pages")
        full = length // self.size
        shared = self.of[source][:full]
        for page in shared:
            self._users[page] += 1
        self.of[slot] = shared
        if length % self.size == 0:
            return None
        self.of[slot].append(self._take())
        return self.of[source][full], self.of[slot][full]

    def problems(self) -> Iterator[str]:
        """What does not add up; for tests."""
        users = [0] * len(self._users)
        for held in self.of:
            for page in held:
                users[page] += 1
        if users != self._users:
            yield f"pages are used {users}, the books say {self._users}"
        if sorted(self._free) != [page for page, count in enumerate(users) if not count]:
            yield "the free pages are not those that nobody uses"

    def _take(self) -> int:
        if not self._free:
            raise OutOfPages(f"all {len(self._users)} pages of keys and values are in use")
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)
