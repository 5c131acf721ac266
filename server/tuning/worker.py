"""One job in the hands of this process: what the tuner says of it becomes events, checkpoints, and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from deltas.errors import DeltaError
from deltas.formats import native
from server import logging
from server.errors import DeltaserveError, InvalidRequest, Unavailable
from server.metrics import Metrics
from server.store.delta_fields import DeltaFields, fields_of
from server.store.job_records import (
    Checkpoint,
    Claimed,
    Event,
    JobError,
    StaleLease,
    checkpoint_model,
)
from server.store.jobs import JobStore
from server.tuning import folders
from server.tuning.curves import Curves, valid
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
from server.tuning.publish import Publisher
from server.tuning.spec import JobSpec
from server.tuning.tuner import Tuner
from server.tuning.turns import APART, Turns

log = logging.get("server.tuning")

MOST_DEATHS = 3  # of the tuner in a row without a new checkpoint, the last of them with no other job in it
_RETRY_SECONDS = 1.0
_RESTS = "The job waits to be resumed"

T = TypeVar("T")


class Ask(msgspec.Struct, frozen=True):
    """Stop with a checkpoint: a pause, or this process ends."""


class Turn(msgspec.Struct, frozen=True):
    """The job may train now."""


class GiveWay(msgspec.Struct, frozen=True):
    """Stop with a checkpoint and ask for another turn: a suspect is to train alone."""


@dataclass(frozen=True)
class Tools:
    """What every worker uses."""

    jobs: JobStore
    tuner: Tuner
    publisher: Publisher
    metrics: Metrics
    backbone: str
    retry_seconds: float = _RETRY_SECONDS
    turns: Turns = field(default_factory=Turns)


class Worker:
    """Works on one claimed job until it ends, rests, or is somebody else's."""

    def __init__(self, tools: Tools, claimed: Claimed, folder: Path) -> None:
        self.lease = claimed.lease
        self.inbox: asyncio.Queue[FromTuner | TunerDied | Ask | Turn | GiveWay] = asyncio.Queue()
        self._tools = tools
        self._record = claimed.record
        self._folder = folder
        self._progress = claimed.record.progress
        self._curves = Curves(folder)
        self._stopping = False
        self._training = False
        self._giving_way = False
        self._advanced = False  # has it a new checkpoint since it was started last?
        self._begun: tuple[float, int] | None = None  # when, and at which step, it began here
        self._events: list[Event] = []

    async def run(self) -> None:
        """Do it. Raises StaleLease when the job is no longer this worker's: the tuner has been told, if it has it."""
        try:
            await self._run_or_fail()
        except StaleLease:
            await self._tools.tuner.stop(self.lease.job, keep=False)
            raise
        finally:
            self._tools.turns.leave(self.lease.job)

    async def _run_or_fail(self) -> None:
        try:
            await self._run()
            return
        except StaleLease:
            raise
        except (DeltaserveError, DeltaError) as error:
            param = error.param if isinstance(error, DeltaserveError) else error.field
            code = error.code if isinstance(error, DeltaserveError) else "invalid_delta"
            failure = JobError(code, str(error), param)
        except Exception as error:  # whatever it is, it must not leave the job running for ever
            log.error("tuning_job_broken", job=self.lease.job, exc_info=error)
            failure = JobError("internal_error", "the job failed for a reason that the server's log has")
        await self._tools.tuner.stop(self.lease.job, keep=False)
        await self._fail(failure)

    async def rest(self) -> None:
        """Give the job back, if it is still this worker's."""
        try:
            await self._tools.jobs.rest(self.lease, self._event(_RESTS))
        except (StaleLease, Unavailable) as error:
            log.warning("tuning_job_not_given_back", job=self.lease.job, reason=str(error))

    async def _run(self) -> None:
        last = await asyncio.to_thread(folders.finished, self._folder)
        if last is not None:
            await self._publish(last)
            return
        if self._record.spec is None:
            raise InvalidRequest(
                "the job was interrupted while its files were being validated: create it again"
            )
        if self._record.fields.backbone != self._tools.backbone:
            raise InvalidRequest(
                f"the job is for the backbone '{self._record.fields.backbone}', and '{self._tools.backbone}' is served now",
                code="other_backbone",
            )
        self._queue_up()
        done = False
        while not done:
            batch = [await self.inbox.get()]
            while not self.inbox.empty():
                batch.append(self.inbox.get_nowait())
            for message in batch:
                done = done or await self._take(message)
            await self._flush()

    def _queue_up(self) -> None:
        """Ask for a turn in the tuner."""
        put, suspect = self.inbox.put_nowait, self._progress.deaths >= APART
        if suspect:
            self._note(
                "The job trains alone until its next checkpoint: the tuner ended several times with it"
            )
        turns = self._tools.turns
        turns.ask(self.lease.job, partial(put, Turn()), partial(put, GiveWay()), suspect=suspect)

    async def _start(self) -> None:
        self._training, self._advanced, self._giving_way = True, False, False
        spec = msgspec.json.decode(self._record.spec or b"", type=JobSpec)
        await self._kept(lambda: self._tools.tuner.start(spec, str(self._folder)))

    async def _take(self, message: FromTuner | TunerDied | Ask | Turn | GiveWay) -> bool:
        """True when nothing is left to be done."""
        match message:
            case Begun():
                self._begin(message)
            case Stepped():
                self._step(message)
            case Evaluated():
                self._evaluate(message)
            case Checkpointed():
                await self._checkpoint(message)
            case Finished():
                self._tools.turns.leave(self.lease.job)
                await asyncio.to_thread(folders.note_finished, self._folder, message)
                await self._publish(message)
                return True
            case Stopped():
                self._training = False
                self._tools.turns.leave(self.lease.job)
                if self._stopping or not self._giving_way:
                    await self._leave(_RESTS if self._stopping else "The tuner let go of the job")
                    return True
                self._queue_up()
            case Failed():
                await self._fail(JobError(message.code, message.message, message.param))
                return True
            case TunerDied():
                return await self._died(message)
            case Ask() if not self._training:
                await self._leave(_RESTS)
                return True
            case Ask() if not self._stopping:
                self._stopping = True
                await self._tools.tuner.stop(self.lease.job, keep=True)
            case Turn():
                await self._start()
            case GiveWay():
                self._giving_way = True
                await self._tools.tuner.stop(self.lease.job, keep=True)
        return False

    def _begin(self, message: Begun) -> None:
        self._curves.rewind(message.step)
        self._begun = (time.monotonic(), message.step)
        self._progress = msgspec.structs.replace(
            self._progress, step=message.step, steps=message.steps, trained_tokens=self._curves.tokens
        )
        begun = "Training started" if message.step == 0 else f"Training goes on after step {message.step}"
        copied, whole = message.private_bytes, message.backbone_bytes
        self._note(
            f"{begun}: {message.trainable} parameters on the engine's weights ({copied} of {whole} bytes copied)",
            steps=message.steps,
            trainable_parameters=message.trainable,
            process_bytes=message.process_bytes,
        )

    def _step(self, message: Stepped) -> None:
        self._curves.stepped(message)
        self._tools.metrics.tuned(message.tokens)
        steps = self._progress.steps
        self._progress = msgspec.structs.replace(
            self._progress,
            step=message.step,
            epoch=message.epoch,
            trained_tokens=self._progress.trained_tokens + message.tokens,
            seconds=self._progress.seconds + message.seconds,
            estimated_finish=self._estimate(message.step),
        )
        self._events.append(
            self._event(
                f"Step {message.step}/{steps}: training loss={message.loss:.4f}",
                kind="metrics",
                total_steps=steps,
                **self._curves.at(message.step),
            )
        )

    def _evaluate(self, message: Evaluated) -> None:
        self._curves.evaluated(message)
        numbers = ", ".join(f"{name}={value:.4f}" for name, value in sorted(message.metrics.items()))
        data: dict[str, Any] = {"step": message.step, "best": message.best, **valid(message.metrics)}
        text = f"Step {message.step}: validation {numbers}" + (" (best so far)" if message.best else "")
        self._events.append(self._event(text, kind="metrics", **data))

    async def _checkpoint(self, message: Checkpointed) -> None:
        await self._flush()
        file = Path(message.file)
        name = await asyncio.to_thread(folders.serve, self._folder, file, message.step)
        fields = await asyncio.to_thread(_fields, file, self._record.fields.backbone)
        if message.step > self._progress.checkpoint:
            self._progress = msgspec.structs.replace(self._progress, checkpoint=message.step, deaths=0)
            self._advanced = True
            self._tools.turns.clear(self.lease.job)
        model = checkpoint_model(self.lease.job, self._record.fields, message.step)
        event = self._event(f"Checkpoint created at step {message.step}: {model}", step=message.step)
        kept = Checkpoint(
            step=message.step,
            file=name,
            fields=fields,
            metrics=self._curves.at(message.step),
            created_at=self._tools.jobs.now(),
        )
        gone = await self._kept(lambda: self._tools.jobs.keep(self.lease, kept, self._progress, event))
        await asyncio.to_thread(folders.unserve, self._folder, gone)

    async def _publish(self, message: Finished) -> None:
        await self._flush()
        self._progress = msgspec.structs.replace(
            self._progress, step=message.step, trained_tokens=message.tokens, estimated_finish=None
        )
        publish = self._tools.publisher.publish
        now, curves = self._tools.jobs.now(), self._curves.text()
        await self._kept(
            lambda: publish(self.lease, self._record, Path(message.file), self._progress, curves, now)
        )

    async def _died(self, message: TunerDied) -> bool:
        self._training = False
        self._tools.turns.leave(self.lease.job)
        if self._stopping:
            await self._leave(
                f"The tuner ended ({message.reason}); the job goes on from its newest checkpoint"
            )
            return True
        deaths = 0 if self._advanced else self._progress.deaths + 1
        self._progress = msgspec.structs.replace(self._progress, deaths=deaths)
        self._note(
            f"The tuner ended: {message.reason}", level="warn", deaths=deaths, jobs_in_it=len(message.jobs)
        )
        await self._flush()
        if deaths >= MOST_DEATHS and message.jobs == [self.lease.job]:
            reason = f"the tuner ended {deaths} times in a row before the next checkpoint, at last with this job alone: "
            await self._fail(JobError("tuner_crashed", reason + message.reason))
            return True
        self._queue_up()
        return False

    async def _leave(self, text: str) -> None:
        await self._flush()
        await self._kept(lambda: self._tools.jobs.rest(self.lease, self._event(text)))

    async def _fail(self, error: JobError) -> None:
        await self._flush()
        curves = self._curves.text()

        async def end() -> None:
            results = await self._tools.publisher.results(self.lease, curves)
            await self._tools.jobs.fail(self.lease, error, [results])

        await self._kept(end)

    async def _flush(self) -> None:
        """Write what has come together. Raises StaleLease."""
        events, self._events = self._events, []
        if events:
            await self._kept(lambda: self._tools.jobs.note(self.lease, events, self._progress))

    async def _kept(self, write: Callable[[], Awaitable[T]]) -> T:
        """The result of ``write``, which is tried again while Redis or the engine are away."""
        while True:
            try:
                return await write()
            except Unavailable as error:
                log.warning("tuning_job_waits", job=self.lease.job, reason=error.message)
            await asyncio.sleep(self._tools.retry_seconds)

    def _estimate(self, step: int) -> int | None:
        if self._begun is None or self._progress.steps is None or step <= self._begun[1]:
            return None
        since, first = self._begun
        left = (time.monotonic() - since) / (step - first) * (self._progress.steps - step)
        return self._tools.jobs.now() + round(left)

    def _note(self, text: str, *, level: Any = "info", **data: Any) -> None:
        self._events.append(self._event(text, level=level, **data))

    def _event(self, text: str, *, level: Any = "info", kind: Any = "message", **data: Any) -> Event:
        return Event(level=level, message=text, type=kind, data=data, created_at=self._tools.jobs.now())


def _fields(file: Path, backbone: str) -> DeltaFields:
    return fields_of(native.load(file), backbone, {})
