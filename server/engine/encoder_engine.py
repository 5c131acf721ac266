"""The step loop of an encoder: takes rows in, runs batches of them, answers each at once. One thread owns everything here.

rows = batcher.next(ready)
hidden = runner.run(rows)
answer each row: its embedding, or what its delta's head makes of it
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from deltas import heads
from deltas.bank import PackedDelta
from deltas.errors import InvalidDelta
from deltas.patches import Pooling
from deltas.weights import FrozenTensors
from server.engine.batching import Batcher, EncodeJob
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.encoder_probe import EncoderProbe
from server.engine.messages import (
    Cancel,
    Drop,
    Encode,
    Encoded,
    Failed,
    Load,
    Loaded,
    Reply,
    Request,
    Stats,
    Submit,
)
from server.engine.pooling import Embedder
from server.engine.quarantine import Quarantine
from server.engine.residency import LoadFailure, Residency
from server.engine.runner import LONGEST_PROMPT
from server.errors import (
    ContextTooLong,
    DeltaRefused,
    DeltaserveError,
    InvalidComposition,
    Quarantined,
    RowFailed,
    UnsupportedTask,
)
from server.types import BackboneInfo, EngineStats, Vector

log = structlog.get_logger(__name__)

STATS_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _Wake:
    """A loader has something; the loop looks by itself."""


class EncoderEngine:
    """Batches of encoder rows over one resident backbone."""

    def __init__(
        self,
        *,
        info: BackboneInfo,
        runner: EncoderRunner,
        batcher: Batcher,
        embedder: Embedder,
        send: Callable[[Reply], None],
        delta_bytes: int,
        host_delta_bytes: int,
    ) -> None:
        self.info = info
        self.runner = runner
        self.batcher = batcher
        self._embedder = embedder
        self._send = send
        self._inbox: queue.SimpleQueue[Request | _Wake | None] = queue.SimpleQueue()
        self._loads: dict[str, list[Load]] = {}  # by digest: who waits for it
        self._idle = False
        self._steps = 0
        self._reported = 0.0
        self._running = 0  # rows of the step before
        self._batch_rows: list[int] = []
        self._batch_deltas: list[int] = []
        self._queued: list[float] = []
        self._quarantine = Quarantine()
        self._probe = EncoderProbe(runner)
        backbone = runner.backbone
        self._positions = backbone.spec.max_positions
        self.residency = Residency(
            backbone.spec,
            backbone.dtype,
            backbone.device,
            weights=FrozenTensors(backbone.folder),
            device_bytes=delta_bytes,
            host_bytes=host_delta_bytes,
            finish=self._finish,
            forget=runner.forget,
            wake=lambda: self._inbox.put(_Wake()),
        )

    def receive(self, request: Request | None) -> None:
        """Hands over a request, from any thread; None ends :meth:`run`: the other side is gone."""
        self._inbox.put(request)

    def run(self) -> None:
        """Works until told to stop. An exception here ends the process, and the client starts another."""
        while self._take_in():
            for failure in self.residency.collect():
                self._fail_load(failure)
            answered = self._answer_loads()
            jobs = self.batcher.next(self._ready)
            self._running = len(jobs)
            if jobs:
                self._step(jobs)
            # else nothing changes until something arrives; a delta just tried could not make room for another
            self._idle = not jobs and not answered
            self._report()
        self.residency.close()

    def _take_in(self) -> bool:
        """Handles what has arrived; waits for something if there is nothing to run. False: it is time to leave."""
        block = self._idle
        if block:
            self.batcher.check_integrity()
        while True:
            try:
                request = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if request is None:
                return False
            self._handle(request)
            block = False

    def _handle(self, request: Request | _Wake) -> None:
        match request:
            case Encode():
                self._accept(request)
            case Cancel(row_id):
                self.batcher.cancel(row_id)
            case Submit(id=row_id):
                self._send(
                    Failed(row_id, UnsupportedTask.code, "this backbone encodes; it does not generate")
                )
            case Load():
                self._loads.setdefault(request.delta.digest, []).append(request)
            case Drop(digest):
                self.residency.drop(digest)
                self._quarantine.forget(digest)
            case _Wake():
                pass

    def _accept(self, request: Encode) -> None:
        now, ref = time.monotonic(), request.delta
        refused = ref is not None and self._quarantine.refuses(ref)
        for row_id, ids in request.rows:
            try:
                if refused:
                    raise Quarantined("this sum of deltas is quarantined: its computation failed before")
                self.batcher.add(EncodeJob(row_id, request.tenant, ids, ref, request.head, now))
            except DeltaserveError as error:
                self._send(Failed(row_id, error.code, error.message))
        if ref is not None and not refused:
            self.residency.prefetch(ref)

    def _ready(self, job: EncodeJob) -> int | None:
        if job.delta is None:
            return 0
        delta = self.residency.resident(job.delta)
        return None if delta is None else delta.prefix_length + _longest_prefix(delta)

    def _step(self, jobs: Sequence[EncodeJob]) -> None:
        """Runs rows and answers them; what cannot run is answered first."""
        began = time.monotonic()
        held = [None if job.delta is None else self.residency.acquire(job.digest) for job in jobs]
        ready: list[tuple[EncodeJob, EncoderRow]] = []
        for job, delta in zip(jobs, held, strict=True):
            self._queued.append(began - job.arrived)
            row = EncoderRow(job.ids, delta)
            error = self._fault(job, row)
            if error is None:
                ready.append((job, row))
            else:
                self._send(Failed(job.id, error.code, error.message))
        if ready:
            self._settle(ready, self.runner.run([row for _, row in ready]))
        for job in jobs:
            if job.delta is not None:
                self.residency.release(job.digest)

    def _fault(self, job: EncodeJob, row: EncoderRow) -> DeltaserveError | None:
        """Why this row cannot run with its delta."""
        if row.shift + len(job.ids) > self._positions:
            virtual = row.shift
            return ContextTooLong(
                f"the input has {len(job.ids)} tokens and its delta {virtual} virtual ones; together the backbone "
                f"takes {self._positions}"
            )
        head = None if row.delta is None else row.delta.head
        if job.head and (head is None or head.pooling is Pooling.NONE):
            return UnsupportedTask("the delta has no head that classifies a whole input")
        return None

    def _settle(self, rows: Sequence[tuple[EncodeJob, EncoderRow]], hidden: Sequence[Tensor]) -> None:
        self._steps += 1
        self._batch_rows.append(len(rows))
        self._batch_deltas.append(len({job.digest for job, _ in rows if job.delta is not None}))
        answers: list[tuple[int, Vector]] = []
        for (job, row), states in zip(rows, hidden, strict=True):
            vector = self._vector(job, row.delta, states)
            if bool(torch.isfinite(vector).all()):
                answers.append((job.id, Vector(vector.cpu().numpy().tobytes())))
            else:
                self._poisoned(job)
        if answers:
            self._send(Encoded(answers))

    @torch.inference_mode()
    def _vector(self, job: EncodeJob, delta: PackedDelta | None, states: Tensor) -> Tensor:
        if job.head and delta is not None and delta.head is not None:
            return heads.apply(delta.head, states).float().contiguous()
        return self._embedder(states)

    def _poisoned(self, job: EncodeJob) -> None:
        """A row's vector is not numbers. Only its delta (or the backbone) can be the cause; neighbours are fine."""
        message = "the row's output is not a number"
        if job.delta is not None:
            dtype = self.info.dtype
            self._quarantine.add(job.delta, f"a row that it served became NaN or infinite in {dtype}")
            message += f"; its {'sum of deltas' if job.delta.parts else 'delta'} is quarantined"
        self._send(Failed(job.id, RowFailed.code, message))

    def _finish(self, delta: PackedDelta) -> PackedDelta:
        """Refuses a delta that leaves no room for a single token, or makes every row of it far too long."""
        virtual = delta.prefix_length + _longest_prefix(delta)
        if virtual > LONGEST_PROMPT:
            raise InvalidDelta(f"{virtual} virtual tokens; this server takes at most {LONGEST_PROMPT}")
        if EncoderRow([], delta).shift >= self._positions:
            raise InvalidDelta(f"its virtual tokens take all of the backbone's {self._positions} positions")
        return delta

    def _fail_load(self, failure: LoadFailure) -> None:
        log.warning("delta load failed", digest=failure.digest, reason=failure.message)
        load_code, row_code = DeltaRefused.code, RowFailed.code
        if failure.of_sum:
            load_code = row_code = InvalidComposition.code
        for load in self._loads.pop(failure.digest, []):
            self._send(Failed(load.id, load_code, failure.message))
        what = "these deltas cannot be composed" if failure.of_sum else "the delta could not be loaded"
        for job in self.batcher.fail_waiting(failure.digest):
            self._send(Failed(job.id, row_code, f"{what}: {failure.message}"))

    def _answer_loads(self) -> bool:
        """Tries one delta that has arrived on the device: a probe costs a small step, so rows wait for one at most."""
        for digest, loads in list(self._loads.items()):
            delta = self.residency.resident(loads[-1].delta)
            if delta is None:
                continue
            del self._loads[digest]
            result = self._probe.run(delta)
            if result.message:
                log.warning("probe", digest=digest, outcome=result.outcome, message=result.message)
            for load in loads:
                self._send(Loaded(load.id, result))
            return True
        return False

    def _report(self) -> None:
        now = time.monotonic()
        if not self._idle and now - self._reported < STATS_SECONDS:
            return
        self._reported = now
        tiers, counts = self.residency, self.residency.counts
        stats = EngineStats(
            rows_running=self._running,
            rows_waiting=len(self.batcher),
            deltas_device=tiers.count_on_device,
            deltas_host=tiers.count_on_host,
            delta_bytes_device=tiers.bytes_on_device,
            delta_bytes_host=tiers.bytes_on_host,
            steps=self._steps,
            loads_from_host=counts.from_host,
            loads_from_disk=counts.from_disk,
            load_failures=counts.failures,
            quarantined=dict(self._quarantine.deltas),
            load_seconds=counts.seconds,
            batch_rows=self._batch_rows,
            batch_deltas=self._batch_deltas,
            queue_seconds=self._queued,
        )
        self._send(Stats(stats))
        counts.seconds = []
        self._batch_rows, self._batch_deltas, self._queued = [], [], []


def _longest_prefix(delta: PackedDelta) -> int:
    return max((len(prefix.keys) for prefix in delta.prefixes.values()), default=0)
