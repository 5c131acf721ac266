"""The step loop: takes requests in, plans, runs, settles, tells. One thread owns everything here.

plan = scheduler.next(ready)
out = runner.run(plan)
settle(plan, out)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deltas.bank import PackedDelta
from server.engine.logprobs import prompt_logprobs
from server.engine.loop import StepLoop
from server.engine.messages import Encode, Failed, Reply, Step, Submit
from server.engine.plan import Plan, PlannedRow
from server.engine.probe import AnyProbe
from server.engine.runner import StepOutput, StepRunner, unscored
from server.engine.sampler import RowSampler, sample
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import DeltaserveError, QueueTimeout, RowFailed, UnsupportedTask
from server.types import BackboneInfo, EngineStats, FinishReason, TokenEvent, TokenLogprob


@dataclass(eq=False)
class _Row:
    """What the engine keeps of a row besides its place in the schedule."""

    sampler: RowSampler
    ends: frozenset[int]  # tokens that end it
    slot: int | None = None
    delta: PackedDelta | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


class Engine(StepLoop):
    """Continuous batching over one resident backbone."""

    def __init__(
        self,
        *,
        info: BackboneInfo,
        runner: StepRunner,
        probe: AnyProbe[Any],
        scheduler: Scheduler,
        send: Callable[[Reply], None],
        delta_bytes: int,
        host_delta_bytes: int,
        pinned_delta_share: float,
    ) -> None:
        super().__init__(
            info,
            runner.backbone,
            probe,
            send,
            finish=runner.finish,
            forget=runner.forget,
            delta_bytes=delta_bytes,
            host_delta_bytes=host_delta_bytes,
            pinned_delta_share=pinned_delta_share,
        )
        self.runner = runner
        self.scheduler = scheduler
        self._rows: dict[int, _Row] = {}

    def _step(self) -> bool:
        plan = self.scheduler.next(self._ready)
        self._begin(plan)
        if plan.rows:
            out = self.runner.run(plan.rows, [self._rows[row.seq.id].delta for row in plan.rows])
            self._settle(plan, out)
        return bool(plan.rows)

    def _check_integrity(self) -> None:
        if not self._rows:
            self.scheduler.check_integrity()

    def _accept(self, request: Submit | Encode) -> None:
        if isinstance(request, Submit):
            self._submit(request)
            return
        for row_id, _ in request.rows:
            message = "this backbone generates; it does not encode"
            self._send(Failed(row_id, UnsupportedTask.code, message))

    def _cancel(self, row_id: int) -> None:
        seq = self.scheduler.cancel(row_id)
        if seq is not None:
            self._close(seq)

    def _submit(self, request: Submit) -> None:
        seq = Sequence(
            id=request.id,
            tenant=request.tenant,
            prompt=request.prompt,
            source=request.source,
            sampling=request.sampling,
            delta=request.delta,
            weight=request.weight,
            priority=request.priority,
            arrived=time.monotonic(),
        )
        eos = self.info.eos_token_ids
        try:
            self._check_quarantine(seq.delta)
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
        if delta is None:
            return None
        # what leaves no room is rejected
        return self.runner.before(delta) if self.runner.holds(seq, delta) else self.scheduler.slot_tokens

    def _begin(self, plan: Plan) -> None:
        """Gives admitted rows their delta and its prefix; answers those that cannot fit."""
        for seq in plan.rejected:
            limit = self.scheduler.slot_tokens
            self._fail(
                seq, "context_length_exceeded", f"prompt and its delta's virtual tokens exceed {limit} tokens"
            )
        for seq in plan.preempted:
            row = self._rows[seq.id]
            self._let_go(seq, row)
            row.prompt_logprobs.clear()  # they come again
        for seq in plan.admitted:
            row = self._rows[seq.id]
            if not seq.output:
                self._queued.append((seq.started or seq.arrived) - seq.arrived)
            row.slot = seq.slot
            if seq.delta is not None:
                row.delta = self.residency.acquire(seq.delta.digest)
            self.runner.begin(seq, row.delta)
        for slot in plan.emptied:
            self.runner.empty(slot)

    def _settle(self, plan: Plan, out: StepOutput) -> None:
        """Samples, ends rows that are done, and tells the client."""
        self._note_batch([row.seq.digest for row in plan.rows])
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
            first = len(seq.output) == (0 if token is None else 1)
            events.append(
                (
                    seq.id,
                    TokenEvent(
                        token_ids=[] if token is None else [token],
                        logprobs=None if logprob is None else [logprob],
                        prompt_logprobs=(kept.prompt_logprobs or None) if first else None,
                        finish_reason=reason,
                        cached_tokens=seq.cached if first else 0,
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
        if row.start == 0 and seq.sampling.prompt_logprobs_from == 0:
            kept.append(None)
        first = out.rows[i].first
        targets = seq.prompt[row.start + unscored(row) + 1 : row.start + count + 1]
        if targets:
            kept.extend(prompt_logprobs(out.logits[first : first + len(targets)], targets, top))

    def _finish_reason(self, seq: Sequence, token: int | None) -> FinishReason | None:
        if token in self._rows[seq.id].ends and len(seq.output) > seq.sampling.min_tokens:
            return "stop"
        if seq.remaining <= 0 and (token is not None or seq.uncomputed == 0):
            return "length"
        return None

    def _poisoned(self, seq: Sequence) -> None:
        """A row's logits are not numbers; neighbours are fine."""
        message = self._poison(seq.delta)
        self.scheduler.finish(seq, sound=False)
        self._fail(seq, RowFailed.code, message)

    def _fail(self, seq: Sequence, code: str, message: str) -> None:
        self._close(seq)
        self._send(Failed(seq.id, code, message))

    def _close(self, seq: Sequence) -> None:
        """A row has left the scheduler: let go of its delta and its KV pages."""
        self._let_go(seq, self._rows.pop(seq.id))

    def _let_go(self, seq: Sequence, row: _Row) -> None:
        if row.slot is not None:
            self.runner.end(row.slot)
        if row.delta is not None:
            self.residency.release(seq.digest)
        row.slot = row.delta = None

    def _expire(self) -> float | None:
        for seq in self.scheduler.expire():
            self._fail(seq, QueueTimeout.code, self._too_long(seq.arrived))
        return self.scheduler.next_expiry()

    def _fail_waiting(self, digest: str, code: str, message: str) -> None:
        for seq in self.scheduler.fail_waiting(digest):
            self._fail(seq, code, message)

    def _stats(self) -> EngineStats:
        return EngineStats(
            rows_running=self.scheduler.rows_running,
            rows_waiting=self.scheduler.rows_waiting,
            kv_tokens_used=self.scheduler.kv_tokens_used,
            kv_tokens_total=self.scheduler.kv_tokens,
            preemptions=self.scheduler.preemptions,
            prefix_cache_queries=self.scheduler.cache.queried,
            prefix_cache_hits=self.scheduler.cache.hit,
        )
