"""The step loop of an encoder: takes rows in, runs batches of them, answers each at once. One thread owns everything here.

rows = batcher.next(ready)
hidden = runner.run(rows)
answer each row: its embedding, or what its delta's head makes of it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltas import heads
from deltas.bank import PackedDelta
from deltas.errors import InvalidDelta
from deltas.patches import Pooling
from server.engine.batching import Batcher, EncodeJob
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.encoder_probe import EncoderProbe
from server.engine.loop import StepLoop
from server.engine.messages import Encode, Encoded, Failed, Reply, Submit
from server.engine.pooling import Embedder
from server.engine.runner import LONGEST_PROMPT
from server.errors import ContextTooLong, DeltaserveError, RowFailed, UnsupportedTask
from server.types import BackboneInfo, EngineStats, Vector


class EncoderEngine(StepLoop):
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
        pinned_delta_share: float,
    ) -> None:
        super().__init__(
            info,
            runner.backbone,
            EncoderProbe(runner),
            send,
            finish=self._finish,
            forget=runner.forget,
            delta_bytes=delta_bytes,
            host_delta_bytes=host_delta_bytes,
            pinned_delta_share=pinned_delta_share,
        )
        self.runner = runner
        self.batcher = batcher
        self._embedder = embedder
        self._running = 0  # rows of the step before
        self._positions = runner.backbone.spec.max_positions

    def _step(self) -> bool:
        jobs = self.batcher.next(self._ready)
        self._running = len(jobs)
        if jobs:
            self._encode(jobs)
        return bool(jobs)

    def _check_integrity(self) -> None:
        self.batcher.check_integrity()

    def _cancel(self, row_id: int) -> None:
        self.batcher.cancel(row_id)

    def _accept(self, request: Submit | Encode) -> None:
        if isinstance(request, Submit):
            message = "this backbone encodes; it does not generate"
            self._send(Failed(request.id, UnsupportedTask.code, message))
            return
        now, ref = time.monotonic(), request.delta
        for row_id, ids in request.rows:
            try:
                self._check_quarantine(ref)
                self.batcher.add(EncodeJob(row_id, request.tenant, ids, ref, request.head, now))
            except DeltaserveError as error:
                self._send(Failed(row_id, error.code, error.message))
        if ref is not None and not self._quarantine.refuses(ref):
            self.residency.prefetch(ref)

    def _ready(self, job: EncodeJob) -> int | None:
        if job.delta is None:
            return 0
        delta = self.residency.resident(job.delta)
        return None if delta is None else delta.prefix_length + _longest_prefix(delta)

    def _encode(self, jobs: Sequence[EncodeJob]) -> None:
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
        self._note_batch([job.digest for job, _ in rows])
        answers: list[tuple[int, Vector]] = []
        for (job, row), states in zip(rows, hidden, strict=True):
            vector = self._vector(job, row.delta, states)
            if bool(torch.isfinite(vector).all()):
                answers.append((job.id, Vector(vector.cpu().numpy().tobytes())))
            else:
                self._send(Failed(job.id, RowFailed.code, self._poison(job.delta)))
        if answers:
            self._send(Encoded(answers))

    @torch.inference_mode()
    def _vector(self, job: EncodeJob, delta: PackedDelta | None, states: Tensor) -> Tensor:
        if job.head and delta is not None and delta.head is not None:
            return heads.apply(delta.head, states).float().contiguous()
        return self._embedder(states)

    def _finish(self, delta: PackedDelta) -> PackedDelta:
        """Refuses a delta that leaves no room for a single token, or makes every row of it far too long."""
        virtual = delta.prefix_length + _longest_prefix(delta)
        if virtual > LONGEST_PROMPT:
            raise InvalidDelta(f"{virtual} virtual tokens; this server takes at most {LONGEST_PROMPT}")
        if EncoderRow([], delta).shift >= self._positions:
            raise InvalidDelta(f"its virtual tokens take all of the backbone's {self._positions} positions")
        return delta

    def _fail_waiting(self, digest: str, code: str, message: str) -> None:
        for job in self.batcher.fail_waiting(digest):
            self._send(Failed(job.id, code, message))

    def _stats(self) -> EngineStats:
        return EngineStats(rows_running=self._running, rows_waiting=len(self.batcher))


def _longest_prefix(delta: PackedDelta) -> int:
    return max((len(prefix.keys) for prefix in delta.prefixes.values()), default=0)
