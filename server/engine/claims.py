"""Which delta is to have the next room on the device, and who gives way to it. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

PATIENCE = 32  # steps that a delta waits for room before deltas that are in use must give way


class Candidate(NamedTuple):
    """A delta on the device that may leave it; ``users`` counts the running rows that use it."""

    digest: str
    nbytes: int
    users: int


class Claims:
    """One delta at a time has a claim to room: no other is put on the device before it.

    It keeps the claim for as long as somebody asks for it in each step. Whoever was refused first meanwhile has the
    next one. Residents that are in use go on being used, also by new rows; but once the claim is ``overdue``, some are
    ``closed``: no new row may use them, so that they are free when their running rows have ended.
    """

    def __init__(self) -> None:
        self.holder: str | None = None
        self.closed: frozenset[str] = frozenset()
        self.first: str | None = (
            None  # the first delta that was asked for in vain, in this step or the one before
        )
        self._missed: str | None = None
        self._refused: str | None = None
        self._asked = False
        self._steps = 0

    @property
    def unasked(self) -> bool:
        """Room is kept for a delta that nobody asked for in this step; the next step frees it."""
        return self.holder is not None and not self._asked

    @property
    def overdue(self) -> bool:
        """Has the holder waited for so long that others must give way?"""
        return self._steps >= PATIENCE

    def begin_step(self) -> None:
        """Another step begins; a claim that nobody upheld in the last one is gone."""
        if not self._asked:
            self._pass_on(None)
        self._asked, self._refused = False, None
        self.first, self._missed = self._missed, None

    def miss(self, digest: str) -> None:
        """A delta was asked for that is not on the device, or is closed."""
        self._missed = self._missed or digest
        self.first = self.first or digest

    def allow(self, digest: str) -> bool:
        """May this delta take room? Not while another has the claim."""
        if self.holder in (None, digest):
            return True
        self._refused = self._refused or digest
        return False

    def wait(self, digest: str) -> None:
        """There is no room for this delta now, which is allowed to have it."""
        if self.holder is None:
            self._pass_on(digest)
        if not self._asked:
            self._steps += 1
        self._asked = True

    def close(self, residents: Iterable[Candidate], nbytes: int) -> None:
        """Close the residents that are used least, of ``nbytes`` together if there are as many; closed ones stay closed."""
        closed: list[str] = []
        for digest, size, _ in sorted(residents, key=lambda one: (one.digest not in self.closed, one.users)):
            if nbytes <= 0:
                break
            closed.append(digest)
            nbytes -= size
        self.closed = frozenset(closed)

    def settle(self) -> None:
        """A delta that was allowed to take room has it. Whoever was refused first in this step has the next claim."""
        self._pass_on(self._refused)
        self._asked, self._refused = self.holder is not None, None

    def _pass_on(self, digest: str | None) -> None:
        self.holder, self.closed, self._steps = digest, frozenset(), 0
