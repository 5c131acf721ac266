"""The tuner process: ``python -m server.tuning.process FD SETTINGS WEIGHTS``.

The settings are a :class:`TunerConfig` in JSON, ``WEIGHTS`` is the descriptor of the engine's weights
(``server.engine.shared``). It trains every job it was given, all together, and yields to the engine: by the operating
system's priority, and by a duty cycle where that does not reach (a GPU). It leaves when its socket closes.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from deltas.errors import DeltaError
from server.engine.memory import keep_pages
from server.engine.wire import ChildSide
from server.errors import DeltaserveError
from server.tuning.messages import (
    Begun,
    Failed,
    Finished,
    FromTuner,
    Leave,
    Load,
    Start,
    Stop,
    Stopped,
    ToTuner,
)

Priority = Literal["idle", "low", "normal"]

_OUT_OF_MEMORY_FIRST = "1000"


class TunerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the tuner process needs of the settings.

    ``share`` is of its time, while the engine has rows to compute; None for 1 on a CPU, where the priority does it,
    and a half elsewhere.
    """

    priority: Priority
    threads: int | None
    share: float | None


def main() -> None:
    """Entry point of the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    side: ChildSide[ToTuner, FromTuner] = ChildSide(socket.socket(fileno=int(sys.argv[1])), ToTuner)
    config = msgspec.json.decode(sys.argv[2].encode(), type=TunerConfig)
    _yield_to_others(config.priority)  # before there are threads: each inherits it
    keep_pages()
    os.environ.setdefault("TQDM_DISABLE", "1")
    inbox: queue.SimpleQueue[ToTuner | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(side, inbox), daemon=True, name="inbox").start()
    tuner = Tuner(config, int(sys.argv[3]), inbox, partial(_send, side))
    tuner.run()
    sys.stdout.flush()
    os._exit(0)


class Tuner:
    """The jobs of one process and the loop that trains them."""

    def __init__(
        self,
        config: TunerConfig,
        weights: int,
        inbox: queue.SimpleQueue[ToTuner | None],
        send: Callable[[FromTuner], None],
    ) -> None:
        import torch

        from server.engine import shared
        from server.tuning.forward import Passes
        from server.tuning.trainer import Trainer

        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        self._inbox = inbox
        self._send = send
        self._passes = Passes(shared.load(weights))
        self._trainer = Trainer(self._passes)
        on_cpu = self._passes.backbone.device.type == "cpu"
        self._share = config.share or (1.0 if on_cpu else 0.5)
        self._backbone_bytes = shared.weight_bytes(weights)
        self._engine_rows = 0

    def run(self) -> None:
        """Trains until told to leave, or until the api process is gone."""
        while self._heed():
            began = time.perf_counter()
            for message in self._trainer.step():
                self._send(message)
                if isinstance(message, Finished | Failed):
                    self._trainer.remove(message.job)
            self._rest(time.perf_counter() - began)

    def _heed(self) -> bool:
        """Does what was asked meanwhile; waits where there is nothing to train. False: leave."""
        while True:
            try:
                message = self._inbox.get(block=not self._trainer.runs)
            except queue.Empty:
                return True
            match message:
                case Start():
                    self._start(message)
                case Stop(job, keep):
                    self._stop(job, keep=keep)
                case Load(rows):
                    self._engine_rows = rows
                case Leave():
                    for job in list(self._trainer.runs):
                        self._stop(job, keep=True)
                    return False
                case None:
                    return False

    def _start(self, start: Start) -> None:
        from server.engine import shared
        from server.tuning.run import Run

        job = start.spec.id
        try:
            run = Run.open(start.spec, Path(start.folder), self._passes)
        except DeltaserveError as error:
            self._send(Failed(job, error.code, error.message, error.param))
            return
        except DeltaError as error:
            self._send(Failed(job, "invalid_delta", str(error), error.field))
            return
        self._trainer.add(run)
        self._send(
            Begun(
                job=job,
                step=run.step,
                steps=run.steps,
                backbone_bytes=self._backbone_bytes,
                private_bytes=shared.private_bytes(),
                trainable=run.trainable,
                process_bytes=_own_bytes(),
            )
        )

    def _stop(self, job: str, *, keep: bool) -> None:
        run = self._trainer.runs.get(job)
        if run is None:
            return  # it ended meanwhile, and has said so
        if keep:
            self._send(run.checkpoint())
        self._trainer.remove(job)
        self._send(Stopped(job, run.step))

    def _rest(self, seconds: float) -> None:
        """The rest of a duty cycle in which training took ``seconds``."""
        if self._engine_rows and self._share < 1:
            time.sleep(min(10.0, seconds * (1 - self._share) / self._share))


def _yield_to_others(priority: Priority) -> None:
    """The engine's threads come first, see ``sched(7)``; and in want of memory the kernel ends this process first."""
    if priority == "idle":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif priority == "low":
        os.nice(19)
    Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_FIRST)


def _own_bytes() -> int:
    """Memory that only this process uses, shared libraries and weights apart: see ``proc_pid_smaps(5)``."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _read(side: ChildSide[ToTuner, FromTuner], inbox: queue.SimpleQueue[ToTuner | None]) -> None:
    try:
        while (message := side.receive()) is not None:
            inbox.put(message)
    except OSError:  # reset: it went with something of ours unread
        pass
    os._exit(0)  # nobody is left to train for, and what is on disk is whole


def _send(side: ChildSide[ToTuner, FromTuner], message: FromTuner) -> None:
    try:
        side.send(message)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


if __name__ == "__main__":
    main()
