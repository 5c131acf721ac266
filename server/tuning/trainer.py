"""All active jobs together: a micro-batch of each, one pass of the backbone forward and one back."""

from __future__ import annotations

import time

import torch

from deltas.errors import DeltaError
from server.errors import DeltaserveError
from server.tuning.forward import Passes
from server.tuning.messages import Failed, FromTuner
from server.tuning.run import Run


class Trainer:
    """The runs that train now. Not thread-safe."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._runs: dict[str, Run] = {}

    def add(self, run: Run) -> None:
        """Its rows are part of the next step."""
        self._runs[run.spec.id] = run

    def remove(self, job: str) -> Run | None:
        """Its rows are in no step any more; None if there is no such run."""
        return self._runs.pop(job, None)

    @property
    def runs(self) -> list[Run]:
        return list(self._runs.values())

    def step(self) -> list[FromTuner]:
        """One micro-batch of every run, and what came of it. A run that ended or failed is removed.

        A run's loss is a mean over its own rows and its tensors are in no other's, so the gradient of the sum of all losses
        is for each what it would be alone.
        """
        said: list[FromTuner] = []
        parts = []
        began = time.perf_counter()
        for run in self.runs:
            if run.done:
                self.remove(run.spec.id)
                said.append(run.finished())
                continue
            try:
                parts.append((run, run.part()))
            except (DeltaError, DeltaserveError) as error:
                self.remove(run.spec.id)
                said.append(failed(run.spec.id, error))
        if not parts:
            return said
        outputs = self._passes([part for _, part in parts])
        sound, shares = [], []
        for (run, _), output in zip(parts, outputs, strict=True):
            loss = run.loss(output)
            if bool(torch.isfinite(loss)):
                sound.append(run)
                shares.append(loss)
            else:
                self.remove(run.spec.id)
                said.append(run.diverged())
        if shares:
            torch.stack(shares).sum().backward()  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - began
        tokens = {run.spec.id: run.tokens for run in sound}
        whole = sum(tokens.values())
        for run in sound:
            found = run.settle(seconds * tokens[run.spec.id] / whole)
            said += found
            if run.done or any(isinstance(message, Failed) for message in found):
                self.remove(run.spec.id)
        return said


def failed(job: str, error: DeltaError | DeltaserveError) -> Failed:
    """How it is said that a job cannot go on."""
    if isinstance(error, DeltaError):
        return Failed(job, "invalid_delta", str(error), error.field)
    return Failed(job, error.code, error.message, error.param)
