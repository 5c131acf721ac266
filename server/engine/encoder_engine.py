"""The step loop of an encoder: takes rows in, runs batches of them, answers each at once. One thread owns everything here.

rows = batcher.next(ready)
hidden = runner.run(rows)
answer each row: its embedding, or what its delta's head makes of it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

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
from server.errors import (
    ContextTooLong,
    DeltaserveError,
    InvalidRequest,
    QueueTimeout,
    RowFailed,
    UnsupportedTask,
)
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
        types = runner.backbone.spec.sites.get("embed.types")
        self._types = 1 if types is None else types.in_features

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
        for row_id, row in request.rows:
            try:
                self._check_quarantine(ref)
                self.batcher.add(
                    EncodeJob(
                        row_id, request.tenant, row, ref, request.want, now, request.weight, request.priority
                    )
                )
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
            row = EncoderRow(job.row.ids, delta, job.row.types)
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
        if row.shift + len(row.ids) > self._positions:
            virtual = row.shift
            return ContextTooLong(
                f"the input has {len(row.ids)} tokens and its delta {virtual} virtual ones; together the backbone "
                f"takes {self._positions}"
            )
        if max(row.types or (0,)) >= self._types:
            return InvalidRequest(f"the backbone has {self._types} types of tokens, the input more")
        head = None if row.delta is None else row.delta.head
        match job.want.kind:
            case "head" if head is None or head.pooling is Pooling.NONE:
                return UnsupportedTask("the delta has no head that classifies a whole input")
            case "tokens" if head is None or head.pooling is not Pooling.NONE:
                return UnsupportedTask("the delta has no head that gives an output for every token")
            case "mask" if "head" not in self.runner.backbone.spec.sites:
                return UnsupportedTask("the backbone's checkpoint has no masked-language-model head")
            case "mask" if job.row.mask is None or not 0 <= job.row.mask < len(row.ids):
                return InvalidRequest("the row has no mask")
        return None

    def _settle(self, rows: Sequence[tuple[EncodeJob, EncoderRow]], hidden: Sequence[Tensor]) -> None:
        self._note_batch([job.digest for job, _ in rows])
        answers: list[tuple[int, Vector]] = []
        for job, found in self._outputs(rows, hidden):
            if bool(torch.isfinite(found).all()):
                lines = len(found) if job.want.kind == "tokens" else 1
                answers.append((job.id, Vector(found.float().contiguous().cpu().numpy().tobytes(), lines)))
            else:
                self._send(Failed(job.id, RowFailed.code, self._poison(job.delta)))
        if answers:
            self._send(Encoded(answers))

    @torch.inference_mode()
    def _outputs(
        self, rows: Sequence[tuple[EncodeJob, EncoderRow]], hidden: Sequence[Tensor]
    ) -> Iterator[tuple[EncodeJob, Tensor]]:
        """What each row became: a vector, or for every own token a line of a matrix."""
        masked: list[tuple[EncodeJob, EncoderRow, Tensor]] = []
        for (job, row), states in zip(rows, hidden, strict=True):
            own = states[len(states) - len(row.ids) :]  # a prompt's tokens are before them
            head = None if row.delta is None else row.delta.head
            match job.want.kind:
                case "mask" if job.row.mask is not None:
                    masked.append((job, row, own[job.row.mask]))
                case "head" if head is not None:
                    yield job, heads.apply(head, states)
                case "tokens" if head is not None:
                    yield job, heads.apply(head, own)
                case _:
                    yield job, self._embedder.but(job.want.pooling, job.want.normalise)(states)
        for _, together in groupby(masked, key=lambda entry: entry[0].digest):  # one product a delta
            those = list(together)
            logits = self.runner.logits(torch.stack([state for _, _, state in those]), those[0][1].delta)
            for (job, _, _), line in zip(those, () if logits is None else logits, strict=True):
                yield job, line[job.want.candidates]

    def _finish(self, delta: PackedDelta) -> PackedDelta:
        """Refuses a delta that leaves no room for a single token, or makes every row of it far too long."""
        virtual = delta.prefix_length + _longest_prefix(delta)
        if virtual > LONGEST_PROMPT:
            raise InvalidDelta(f"{virtual} virtual tokens; this server takes at most {LONGEST_PROMPT}")
        if EncoderRow([], delta).shift >= self._positions:
            raise InvalidDelta(f"its virtual tokens take all of the backbone's {self._positions} positions")
        return delta

    def _expire(self) -> float | None:
        for job in self.batcher.expire():
            self._send(Failed(job.id, QueueTimeout.code, self._too_long(job.arrived)))
        return self.batcher.next_expiry()

    def _fail_waiting(self, digest: str, code: str, message: str) -> None:
        for job in self.batcher.fail_waiting(digest):
            self._send(Failed(job.id, code, message))

    def _stats(self) -> EngineStats:
        return EngineStats(rows_running=self._running, rows_waiting=len(self.batcher))


def _longest_prefix(delta: PackedDelta) -> int:
    return max((len(prefix.keys) for prefix in delta.prefixes.values()), default=0)
