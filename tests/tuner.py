"""A stand-in for the tuner's process: it trains nothing, but says and writes what the real one does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deltas import formats
from deltas.formats import native
from deltas.formats.files import DeltaFiles
from deltas.weights import FrozenTensors
from server.config import Settings
from server.tuning.messages import (
    Begun,
    Checkpointed,
    Evaluated,
    Failed,
    Finished,
    FromTuner,
    Stepped,
    Stopped,
    TunerDied,
)
from server.tuning.spec import JobSpec
from server.types import BackboneInfo
from tests.api.running import SPEC, lora_files

STEPS = 6
EVERY = 2  # steps between checkpoints
TOKENS = 10  # of a step


def write_delta(path: Path, seed: int) -> None:
    """A small LoRA in native form."""
    with TemporaryDirectory() as folder:
        files = lora_files(Path(folder) / "peft", seed)
        native.save(formats.read(DeltaFiles(files), SPEC, FrozenTensors(Path())), path)


def write_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint as the tuner leaves it; its delta's file."""
    path = folder / "checkpoints" / f"step-{step}" / "delta.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_delta(path, step)
    return path


class StandIn:
    """A Tuner. With ``gated``, a step is taken for each permit of ``gate``; a job in ``failing`` fails at once."""

    def __init__(self, *, gated: bool = False, steps: int = STEPS) -> None:
        self.gate = asyncio.Semaphore(0)
        self.gated = gated
        self.steps = steps
        self.failing: set[str] = set()
        self.started: list[JobSpec] = []
        self.stopped: list[tuple[str, bool]] = []
        self._said: asyncio.Queue[FromTuner | TunerDied] = asyncio.Queue()
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._at: dict[str, tuple[Path, int]] = {}

    async def start(self, spec: JobSpec, folder: str) -> None:
        self.started.append(spec)
        self._at.setdefault(spec.id, (Path(folder), 0))
        self._runs[spec.id] = asyncio.create_task(self._run(spec, Path(folder)))

    @property
    def training(self) -> set[str]:
        """The jobs in it."""
        return {*self._runs}

    async def stop(self, job: str, *, keep: bool) -> None:
        self.stopped.append((job, keep))
        run = self._runs.pop(job, None)
        if run is None:
            return
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        folder, step = self._at[job]
        if keep:
            self._say(Checkpointed(job, step, str(write_checkpoint(folder, step))))
        self._say(Stopped(job, step))

    def load(self, rows: int) -> None:
        """Rests for nobody."""

    async def messages(self) -> AsyncIterator[FromTuner | TunerDied]:
        while True:
            yield await self._said.get()

    async def die(self, reason: str = "killed by signal 9") -> None:
        """As if the process had ended."""
        runs, self._runs = self._runs, {}
        for run in runs.values():
            run.cancel()
        await asyncio.gather(*runs.values(), return_exceptions=True)
        self._say(TunerDied([*runs], reason))

    async def close(self) -> None:
        """End without a word."""
        for run in self._runs.values():
            run.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)

    async def _run(self, spec: JobSpec, folder: Path) -> None:
        job = spec.id
        assert (folder / "train.msgpack").exists()
        done = [int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")]
        first = max(done, default=0)
        self._at[job] = (folder, first)
        self._say(Begun(job, first, self.steps, 1000, 0, 64))
        for step in range(first + 1, self.steps + 1):
            if self.gated:
                await self.gate.acquire()
            else:
                await asyncio.sleep(0)
            if job in self.failing:
                self._say(Failed(job, "not_finite", "the loss became NaN", "learning_rate"))
                return
            self._at[job] = (folder, step)
            self._say(Stepped(job, step, step / 2, 1 / step, 1e-3, 0.5, TOKENS, 0.01))
            if step % EVERY == 0:
                self._say(Evaluated(job, step, {"loss": 2 / step, "accuracy": step / 10}, True))
                self._say(Checkpointed(job, step, str(write_checkpoint(folder, step))))
        final = folder / "checkpoints" / f"step-{self.steps}" / "delta.safetensors"
        self._say(Finished(job, self.steps, self.steps, str(final), False, self.steps * TOKENS))
        self._runs.pop(job, None)

    def _say(self, message: FromTuner | TunerDied) -> None:
        self._said.put_nowait(message)


@asynccontextmanager
async def open_stand_in(settings: Settings, info: BackboneInfo) -> AsyncGenerator[StandIn, None]:
    """An ``OpenTuner``."""
    del settings, info
    tuner = StandIn()
    try:
        yield tuner
    finally:
        await tuner.close()
