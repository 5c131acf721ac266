"""The step loop: takes requests in, plans, runs, settles, tells. One thread owns everything here.

plan = scheduler.next(ready)
out = runner.run(plan)
settle(plan, out)
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from deltas.bank import PackedDelta
from deltas.weights import FrozenTensors
from server.engine.logprobs import prompt_logprobs
from server.engine.messages import (
    Cancel,
    Drop,
    Encode,
    Failed,
    Load,
    Loaded,
    Reply,
    Request,
    Stats,
    Step,
    Submit,
)
from server.engine.probe import Probe
from server.engine.quarantine import Quarantine
from server.engine.residency import LoadFailure, Residency
from server.engine.runner import Runner, StepOutput
from server.engine.sampler import RowSampler, sample
from server.engine.scheduler import Plan, PlannedRow, Scheduler
from server.engine.sequence import Sequence
from server.errors import (
    DeltaRefused,
    DeltaserveError,
    InvalidComposition,
    Quarantined,
    RowFailed,
    UnsupportedTask,
)
from server.types import BackboneInfo, EngineStats, FinishReason, TokenEvent, TokenLogprob

log = structlog.get_logger(__name__)

STATS_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _Wake:
    """A loader has something; the loop looks by itself."""


@dataclass(eq=False)
class _Row:
    """What the engine keeps of a row besides its place in the schedule."""

    sampler: RowSampler
    ends: frozenset[int]  # tokens that end it
    slot: int | None = None
    delta: PackedDelta | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


class Engine:
    """Continuous batching over one resident backbone."""

    def __init__(
        self,
        *,
        info: BackboneInfo,
        runner: Runner,
        scheduler: Scheduler,
        send: Callable[[Reply], None],
        delta_bytes: int,
        host_delta_bytes: int,
    ) -> None:
        self.info = info
        self.runner = runner
        self.scheduler = scheduler
        self._send = send
        self._inbox: queue.SimpleQueue[Request | _Wake | None] = queue.SimpleQueue()
        self._rows: dict[int, _Row] = {}
        self._loads: dict[str, list[Load]] = {}  # by digest: who waits for it
        self._idle = False
        self._steps = 0
        self._reported = 0.0
        self._batch_rows: list[int] = []
        self._batch_deltas: list[int] = []
        self._queued: list[float] = []
        self._quarantine = Quarantine()
        self._probe = Probe(runner)
        backbone = runner.backbone
        self.residency = Residency(
            backbone.spec,
            backbone.dtype,
            backbone.device,
            weights=FrozenTensors(backbone.folder),
            device_bytes=delta_bytes,
            host_bytes=host_delta_bytes,
            finish=runner.prompt_prefix,
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
            plan = self.scheduler.next(self._ready)
            self._begin(plan)
            if plan.rows:
                out = self.runner.run(plan.rows, [self._rows[row.seq.id].delta for row in plan.rows])
                self._settle(plan, out)
            # else nothing changes until something arrives; a delta just tried could not make room for another
            self._idle = not plan.rows and not answered
            self._report()
        self.residency.close()

    def _take_in(self) -> bool:
        """Handles what has arrived; waits for something if there is nothing to run. False: it is time to leave."""
        block = self._idle
        if block and not self._rows:
            self.scheduler.check_integrity()
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
            case Submit():
                self._submit(request)
            case Cancel(row_id):
                seq = self.scheduler.cancel(row_id)
                if seq is not None:
                    self._close(seq)
            case Encode(rows=rows):
                for row_id, _ in rows:
                    self._send(
                        Failed(row_id, UnsupportedTask.code, "this backbone generates; it does not encode")
                    )
            case Load():
                self._loads.setdefault(request.delta.digest, []).append(request)
            case Drop(digest):
                self.residency.drop(digest)
                self._quarantine.forget(digest)
            case _Wake():
                pass

    def _submit(self, request: Submit) -> None:
        seq = Sequence(
            id=request.id,
            tenant=request.tenant,
            prompt=request.prompt,
            sampling=request.sampling,
            delta=request.delta,
            arrived=time.monotonic(),
        )
        eos = self.info.eos_token_ids
        try:
            if seq.delta is not None and self._quarantine.refuses(seq.delta):
                raise Quarantined("this sum of deltas is quarantined: its computation failed before")
            sampler = RowSampler(
                seq.sampling, seq.prompt, vocab=self.runner.backbone.spec.vocab, eos_token_ids=eos
            )
            self.scheduler.add(seq)
        except DeltaserveError as error:
            self._send(Failed(request.id, error.code, error.message))
            return
        ends = frozenset([*seq.sampling.stop_token_ids, *(() if seq.sampling.ignore_eos else eos)])
        self._rows[seq.id] = _Row(sampler, ends)
        if seq.delta is not None:
            self.residency.prefetch(seq.delta)  # now, so that it is there when a slot is

    def _ready(self, seq: Sequence) -> int | None:
        if seq.delta is None:
            return 0
        delta = self.residency.resident(seq.delta)
        return None if delta is None else delta.prefix_length

    def _begin(self, plan: Plan) -> None:
        """Gives admitted rows their delta and its prefix; answers those that cannot fit."""
        for seq in plan.rejected:
            limit = self.scheduler.slot_tokens
            self._fail(seq, "context_length_exceeded", f"prompt and delta prefix exceed {limit} tokens")
        for seq in plan.admitted:
            self._queued.append((seq.started or seq.arrived) - seq.arrived)
            row = self._rows[seq.id]
            row.slot = seq.slot
            if seq.delta is None or seq.slot is None:
                continue
            row.delta = self.residency.acquire(seq.delta.digest)
            if row.delta.prefix is not None:
                self.runner.kv.put_prefix(seq.slot, row.delta.prefix)

    def _settle(self, plan: Plan, out: StepOutput) -> None:
        """Samples, ends rows that are done, and tells the client."""
        self._steps += 1
        self._batch_rows.append(len(plan.rows))
        self._batch_deltas.append(len({row.seq.digest for row in plan.rows if row.seq.delta is not None}))
        sampling = [i for i, row in enumerate(plan.rows) if row.samples]
        lines = [out.rows[i].first + out.rows[i].count - 1 for i in sampling]
        samplers = [self._rows[plan.rows[i].seq.id].sampler for i in sampling]
        logits = out.logits if len(lines) == out.logits.shape[0] else out.logits[lines]
        sampled = sample(logits, samplers)
        failed = {sampling[j] for j in sampled.failed}
        tokens = dict(zip(sampling, sampled.tokens, strict=True))
        logprobs = dict(zip(sampling, sampled.logprobs, strict=True))
        events: list[tuple[int, TokenEvent]] = []
        for i, row in enumerate(plan.rows):
            seq = row.seq
            if i in failed:
                self._poisoned(seq)
                continue
            token = tokens.get(i)
            self._note_prompt(row, out, i)
            seq.advance(row.count, token)
            reason = self._finish_reason(seq, token)
            if token is None and reason is None:
                continue
            logprob = logprobs.get(i)
            kept = self._rows[seq.id]
            first = len(seq.output) <= 1 and kept.prompt_logprobs
            events.append(
                (
                    seq.id,
                    TokenEvent(
                        token_ids=[] if token is None else [token],
                        logprobs=None if logprob is None else [logprob],
                        prompt_logprobs=kept.prompt_logprobs if first else None,
                        finish_reason=reason,
                    ),
                )
            )
            if reason is not None:
                self.scheduler.finish(seq)
                self._close(seq)
        if events:
            self._send(Step(events))

    def _note_prompt(self, row: PlannedRow, out: StepOutput, i: int) -> None:
        """Keeps the log-probabilities of the prompt tokens that this chunk predicts."""
        seq, count = row.seq, row.count
        top = seq.sampling.prompt_logprobs
        if top is None or row.start >= len(seq.prompt):
            return
        kept = self._rows[seq.id].prompt_logprobs
        if row.start == 0:
            kept.append(None)
        targets = seq.prompt[row.start + 1 : row.start + count + 1]
        first = out.rows[i].first
        if targets:
            kept.extend(prompt_logprobs(out.logits[first : first + len(targets)], targets, top))

    def _finish_reason(self, seq: Sequence, token: int | None) -> FinishReason | None:
        if token in self._rows[seq.id].ends and len(seq.output) > seq.sampling.min_tokens:
            return "stop"
        if seq.remaining <= 0 and (token is not None or seq.uncomputed == 0):
            return "length"
        return None

    def _poisoned(self, seq: Sequence) -> None:
        """A row's logits are not numbers. Only its delta (or the backbone) can be the cause; neighbours are fine."""
        what = "delta"
        if seq.delta is not None:
            dtype = self.info.dtype
            self._quarantine.add(seq.delta, f"a row that it served became NaN or infinite in {dtype}")
            what = "sum of deltas" if seq.delta.parts else what
        self.scheduler.finish(seq)
        self._fail(seq, RowFailed.code, f"the row's output is not a number; its {what} is quarantined")

    def _fail(self, seq: Sequence, code: str, message: str) -> None:
        self._close(seq)
        self._send(Failed(seq.id, code, message))

    def _close(self, seq: Sequence) -> None:
        """A row has left the scheduler: let go of its delta and its KV pages."""
        row = self._rows.pop(seq.id)
        if row.slot is not None:
            self.runner.kv.release(row.slot, seq.prefix + seq.computed)
        if row.delta is not None:
            self.residency.release(seq.digest)

    def _fail_load(self, failure: LoadFailure) -> None:
        log.warning("delta load failed", digest=failure.digest, reason=failure.message)
        load_code, row_code, message = DeltaRefused.code, RowFailed.code, failure.message
        if failure.of_sum:
            load_code = row_code = InvalidComposition.code
        for load in self._loads.pop(failure.digest, []):
            self._send(Failed(load.id, load_code, message))
        what = "these deltas cannot be composed" if failure.of_sum else "the delta could not be loaded"
        for seq in self.scheduler.fail_waiting(failure.digest):
            self._fail(seq, row_code, f"{what}: {message}")

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
        self._send(
            Stats(
                EngineStats(
                    rows_running=self.scheduler.rows_running,
                    rows_waiting=self.scheduler.rows_waiting,
                    kv_tokens_used=self.scheduler.kv_tokens_used,
                    kv_tokens_total=self.scheduler.kv_tokens,
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
            )
        )
        counts.seconds = []
        self._batch_rows, self._batch_deltas, self._queued = [], [], []
