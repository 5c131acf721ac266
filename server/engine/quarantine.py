"""What gave rows that are not numbers: deltas, for the registry to mark, and sums, which are refused here.

A sum is nobody's delta and its parts may each be sound (a weight alone can overflow), so none of them is to be
quarantined for it. The sum itself is refused for the rest of this process's life, or until a part is deleted.
"""

from __future__ import annotations

from collections import OrderedDict

from server.types import DeltaRef

MOST_SUMS = 1024  # names of sums are free to invent; past this many the oldest may fail a row again


class Quarantine:
    """Owned by the step loop. ``deltas``: single deltas' digests, in the order in which they failed, and why."""

    def __init__(self) -> None:
        self.deltas: dict[str, str] = {}
        self._sums: OrderedDict[str, frozenset[str]] = OrderedDict()  # the parts' digests

    def add(self, ref: DeltaRef, reason: str) -> None:
        """A row of this delta or sum was poisoned. A delta's first reason stays."""
        if ref.parts:
            self._sums[ref.digest] = frozenset(part.digest for part in ref.parts)
            while len(self._sums) > MOST_SUMS:
                self._sums.popitem(last=False)
        else:
            self.deltas.setdefault(ref.digest, reason)

    def refuses(self, ref: DeltaRef) -> bool:
        """Whether this sum has failed before. Single deltas are refused by their names, before they come here."""
        return ref.digest in self._sums

    def forget(self, digest: str) -> None:
        """The delta was deleted."""
        self.deltas.pop(digest, None)
        for whole in [whole for whole, parts in self._sums.items() if digest in parts]:
            del self._sums[whole]
