"""How the learning rate goes over a job's steps, and which rows each step reads: both known before the first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from server.tuning.spec import JobSpec


def factor(spec: JobSpec, step: int, steps: int) -> float:
    """What the peak rate is multiplied by at ``step``, counted from 0, of ``steps``.

    It rises over the first ``warmup`` share of the steps to 1, and falls to 0 behind the last, by a line or half a
    cosine, if it falls.
    """
    rising = math.ceil(spec.warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    match spec.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Order:
    """The order of a job's rows: every epoch all of them, shuffled by the job's seed and the epoch's number alone.

    A step has ``accumulation`` micro-batches of ``batch_size`` rows; an epoch's last may have fewer of either.
    """

    rows: int
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(self.rows / (self.batch_size * self.accumulation))

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of a step, counted from 0, as numbers of rows."""
        epoch, place = divmod(step, self.steps_an_epoch)
        size = self.batch_size * self.accumulation
        rows = self._shuffled(epoch)[place * size : (place + 1) * size]
        return [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        shuffled: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return shuffled
