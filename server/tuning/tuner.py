"""What the job service needs of the tuner: a protocol, so that it is tested against a small stand-in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from server.config import Settings
from server.tuning.messages import FromTuner, TunerDied
from server.tuning.spec import JobSpec
from server.types import BackboneInfo


class Tuner(Protocol):
    """The only door to the tuner's process."""

    async def start(self, spec: JobSpec, folder: str) -> None:
        """Run the job whose encoded data lie in ``folder``, from its newest checkpoint there if it has one."""

    async def stop(self, job: str, *, keep: bool) -> None:
        """End a job after the step in progress; with a checkpoint if ``keep``. ``Stopped`` follows."""

    def load(self, rows: int) -> None:
        """The engine has so many rows to compute."""

    def messages(self) -> AsyncIterator[FromTuner | TunerDied]:
        """What it says, in order, until it is closed."""


OpenTuner = Callable[[Settings, BackboneInfo], AbstractAsyncContextManager[Tuner]]
"""Starts a tuner on the weights of the resident backbone, and ends it."""
