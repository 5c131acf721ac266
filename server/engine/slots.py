"""KV slots, and what they hold: a prompt that begins as an earlier row did need not be computed again.

Pure Python. A slot keeps the tokens of the row that left it until another row takes it, so the cache costs no memory of
its own. What a token's keys and values are depends on everything before them: a row may use another's only where the
tenant, the delta and every earlier token are the same (the backbone is, as long as the process lives).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

Key = tuple[str, str]
"""The tenant and the delta's digest."""


@dataclass(frozen=True, slots=True)
class Held:
    """The tokens whose keys and values a slot holds, behind those of the delta's own prefix."""

    key: Key
    tokens: Tokens[int]


class SlotPool:
    """The slots that no row runs in. Those that hold nothing are given out first, then the one left longest ago."""

    def __init__(self, count: int) -> None:
        self._empty = list(range(count - 1, -1, -1))  # used last, first out: its memory is warm
        self._held: dict[int, Held] = {}  # oldest first
        self._used = [0] * count  # tokens of memory that a slot may have touched since it was emptied

    def __len__(self) -> int:
        return len(self._empty) + len(self._held)

    def __iter__(self) -> Iterator[int]:
        yield from self._empty
        yield from self._held

    @property
    def tokens(self) -> int:
        """Tokens of memory that the slots which hold something may have touched."""
        return sum(self._used[slot] for slot in self._held)

    def best(self, key: Key, tokens: Tokens[int]) -> tuple[int, int] | None:
        """The slot that begins with most of ``tokens``, and how many; None where none has the first."""
        found: tuple[int, int] | None = None
        for slot, held in self._held.items():
            count = common(held.tokens, tokens) if held.key == key else 0
            if count and (found is None or count >= found[1]):
                found = (slot, count)
        return found

    def take(self, shared: int | None, count: int) -> int:
        """A slot to run in, for a row that begins with ``count`` tokens of the slot ``shared``.

        That one itself if nobody loses by it or there is no other, with its content; else another, to copy to.
        """
        held = None if shared is None else self._held.get(shared)
        if shared is not None and held is not None and (len(held.tokens) == count or len(self) == 1):
            del self._held[shared]
            return shared
        if self._empty:
            return self._empty.pop()
        slot = next(slot for slot in self._held if slot != shared)
        del self._held[slot]
        self._used[slot] = 0  # who begins there gives back what is too much
        return slot

    def put(self, slot: int, used: int, held: Held | None) -> None:
        """A row has left; ``used`` tokens of the slot's memory were written, and what it ``held`` may be used again."""
        self._used[slot] = max(self._used[slot], used)
        if held is None or not held.tokens:
            self._empty.append(slot)
        else:
            self._held[slot] = held

    def shrink(self, tokens: int) -> None:
        """Forgets the oldest contents until the rest fits into so many tokens."""
        over = self.tokens - tokens
        for slot in list(self._held):
            if over <= 0:
                return
            over -= self._used[slot]
            del self._held[slot]
            self._empty.append(slot)

    def empty(self) -> list[int]:
        """The slots that hold nothing but may have memory: the caller gives it back, and they are not named again."""
        found = [slot for slot in self._empty if self._used[slot]]
        for slot in found:
            self._used[slot] = 0
        return found


def common(a: Tokens[int], b: Tokens[int]) -> int:
    """How many tokens two rows begin with alike."""
    low, high = 0, min(len(a), len(b))
    if not high or a[0] != b[0]:
        return 0
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] and b[:low] are equal, a[:high] and b[:high] are not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
