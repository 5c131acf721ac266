"""Who may train now: all jobs together or, while there are suspects, one of them alone.

When the tuner dies with several jobs in it, nothing tells which one was to blame. So a job whose lives ended twice in a
row without a new checkpoint is a *suspect*: it trains alone until it has one. Then it is cleared; or the tuner dies again,
of nothing but this job.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

APART = 2  # deaths of the tuner in a row, without a new checkpoint of a job, that make it a suspect


@dataclass
class _Job:
    """``begin`` is called when its turn comes, ``give_way`` when it is to come back for another."""

    suspect: bool
    begin: Callable[[], None]
    give_way: Callable[[], None]
    asked: bool = False  # to give way


class Turns:
    """The jobs of one process, which has one tuner. Suspects come first, one at a time in the order in which they asked."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Job] = {}
        self._training: dict[str, _Job] = {}

    def ask(
        self, job: str, begin: Callable[[], None], give_way: Callable[[], None], *, suspect: bool
    ) -> None:
        """A job that does not train wants to. One of the callbacks may be called at once."""
        self._waiting[job] = _Job(suspect, begin, give_way)
        self._settle()

    def leave(self, job: str) -> None:
        """It trains no more, or does not want to."""
        self._waiting.pop(job, None)
        self._training.pop(job, None)
        self._settle()

    def clear(self, job: str) -> None:
        """It has a new checkpoint, hence is no suspect."""
        if job in self._training:
            self._training[job].suspect = False
            self._settle()

    def _settle(self) -> None:
        suspects = [name for name, job in self._waiting.items() if job.suspect]
        if suspects:
            if not self._training:
                self._begin(suspects[0])
            for job in self._training.values():
                if not job.suspect and not job.asked:
                    job.asked = True
                    job.give_way()
        elif not any(job.suspect for job in self._training.values()):
            for name in [*self._waiting]:
                self._begin(name)

    def _begin(self, name: str) -> None:
        job = self._training[name] = self._waiting.pop(name)
        job.begin()
