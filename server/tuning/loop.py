"""What the tuner process does: it trains all its jobs in one pass, and heeds what it is told between steps."""

from __future__ import annotations

import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from deltas.errors import DeltaError
from server.engine import shared
from server.errors import DeltaserveError
from server.tuning.forward import Passes
from server.tuning.messages import Begun, Failed, FromTuner, Leave, Load, Start, Stop, Stopped, ToTuner
from server.tuning.process import TunerConfig
from server.tuning.run import Run
from server.tuning.spec import JobSpec
from server.tuning.trainer import Trainer, failed

# what torch raises, for want of memory mostly; whatever it is, it ends one job and not all
_ACCIDENTS = (RuntimeError, MemoryError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Tuner:
    """The jobs of one process and the loop that trains them."""

    def __init__(
        self,
        config: TunerConfig,
        weights: int,
        inbox: queue.SimpleQueue[ToTuner],
        send: Callable[[FromTuner], None],
    ) -> None:
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        self._inbox = inbox
        self._send = send
        self._passes = Passes(shared.load(weights))
        self._trainers = [Trainer(self._passes)]  # one for all jobs; after an accident, one for each
        on_cpu = self._passes.backbone.device.type == "cpu"
        self._share = config.share or (1.0 if on_cpu else 0.5)
        self._backbone_bytes = shared.weight_bytes(weights)
        self._engine_rows = 0

    def run(self) -> None:
        """Trains until told to leave, or until the api process is gone."""
        while self._heed():
            for trainer in list(self._trainers):
                began = time.perf_counter()
                try:
                    for message in trainer.step():
                        self._send(message)
                except _ACCIDENTS as error:
                    traceback.print_exc()
                    self._separate(trainer, error)
                self._rest(time.perf_counter() - began)

    @property
    def _runs(self) -> dict[str, tuple[Trainer, Run]]:
        return {run.spec.id: (trainer, run) for trainer in self._trainers for run in trainer.runs}

    def _heed(self) -> bool:
        """Does what was asked meanwhile; waits where there is nothing to train. False: leave."""
        while True:
            try:
                message = self._inbox.get(block=not self._runs)
            except queue.Empty:
                return True
            match message:
                case Start(spec, folder):
                    self._start(spec, folder)
                case Stop(job, keep):
                    self._stop(job, keep=keep)
                case Load(rows):
                    self._engine_rows = rows
                case Leave():
                    for job in self._runs:
                        self._stop(job, keep=True)
                    return False

    def _start(self, spec: JobSpec, folder: str) -> None:
        run = self._open(spec, folder)
        if run is None:
            return
        if not self._runs:
            self._trainers = [self._new_trainer()]
        elif len(self._trainers) > 1:
            self._trainers.append(self._new_trainer())
        self._trainers[-1].add(run)
        self._send(
            Begun(
                job=spec.id,
                step=run.step,
                steps=run.steps,
                backbone_bytes=self._backbone_bytes,
                private_bytes=shared.private_bytes(),
                trainable=run.trainable,
                process_bytes=_own_bytes(),
            )
        )

    def _open(self, spec: JobSpec, folder: str | Path) -> Run | None:
        """A job where it left off, or at its beginning; None, and said, if it cannot work."""
        try:
            return Run.open(spec, folder, self._passes)
        except (DeltaError, DeltaserveError) as error:
            self._send(failed(spec.id, error))
        return None

    def _new_trainer(self) -> Trainer:
        return Trainer(self._passes)

    def _stop(self, job: str, *, keep: bool) -> None:
        found = self._runs.get(job)
        if found is None:
            return  # it ended meanwhile, and has said so
        trainer, run = found
        if keep:
            self._send(run.checkpoint())
        trainer.remove(job)
        self._send(Stopped(job, run.step))

    def _separate(self, trainer: Trainer, error: Exception) -> None:
        """A pass failed. A job that was alone in it fails; of several each goes on by itself, from its checkpoint."""
        runs = trainer.runs
        self._trainers.remove(trainer)
        if len(runs) == 1:
            self._send(
                Failed(runs[0].spec.id, _code(error), f"the job's step could not be computed: {error}")
            )
            runs = []
        for run in runs:
            again = self._open(run.spec, run.folder)
            if again is not None:
                self._trainers.append(self._new_trainer())
                self._trainers[-1].add(again)

    def _rest(self, seconds: float) -> None:
        """The rest of a duty cycle in which training took ``seconds``."""
        if self._engine_rows and self._share < 1:
            time.sleep(min(10.0, seconds * (1 - self._share) / self._share))


def _code(error: Exception) -> str:
    """A CPU's allocator has no exception of its own."""
    lacks = (
        isinstance(error, MemoryError)
        or "can't allocate memory" in str(error)
        or "out of memory" in str(error)
    )
    return "out_of_memory" if lacks else "tuning_failed"


def _own_bytes() -> int:
    """Memory that only this process uses, shared libraries and weights apart: see ``proc_pid_smaps(5)``."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
