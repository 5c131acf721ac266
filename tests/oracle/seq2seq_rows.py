"""Runs an encoder-decoder's rows through the real runner without a process around it."""

from __future__ import annotations

from collections.abc import Sequence as Several
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deltas import methods
from deltas.bank import PackedDelta
from deltas.delta import Delta
from deltas.ops import Mode
from deltas.pack import pack
from deltas.weights import FrozenTensors
from server.engine.backbone import load
from server.engine.plan import PlannedRow
from server.engine.seq2seq import Seq2SeqRunner
from server.engine.sequence import Sequence
from server.types import DeltaRef, SamplingParams
from tests.oracle.padded import BACKBONES, PaddedRow

SLOTS = 40


@cache
def runner_of(family: str, mode: Mode = "native") -> Seq2SeqRunner:
    return make_runner(BACKBONES / family, mode)


def make_runner(folder: Path, mode: Mode | None = None, dtype: torch.dtype = torch.float32) -> Seq2SeqRunner:
    backbone = load(folder.name, folder, torch.device("cpu"), dtype)
    return Seq2SeqRunner(backbone, SLOTS, capacity=96, source_capacity=512, mode=mode)


def place(runner: Seq2SeqRunner, delta: Delta) -> PackedDelta:
    """What the residency does with a loaded delta."""
    spec = runner.backbone.spec
    patches = methods.lower(delta, spec, FrozenTensors(runner.backbone.folder))
    return runner.finish(pack(patches, spec, runner.backbone.dtype))


def score(runner: Seq2SeqRunner, rows: Several[PaddedRow], *, first: int = 1, chunk: int = 1) -> list[Tensor]:
    """The logits ``[decoder tokens, vocab]`` of every row, its decoder's tokens given.

    They are computed ``first`` at once, then in chunks. All rows share steps, ``SLOTS`` of them at a time: some begin
    while others are further on, and slots are used again.
    """
    waiting = list(enumerate(rows))
    live: list[tuple[int, Sequence, PaddedRow]] = []
    free = list(range(SLOTS))
    parts: list[list[Tensor]] = [[] for _ in rows]
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
    while waiting or live:
        for _ in range(min(len(waiting), len(free), 1 + SLOTS // 3)):
            index, row = waiting.pop(0)
            ref = None if row.delta is None else DeltaRef(f"{id(row.delta):x}")
            seq = Sequence(index, "t", list(row.decoder_ids or []), sampling, ref, source=list(row.ids))
            seq.slot = free.pop()
            seq.prefix = 0 if row.delta is None else runner.before(row.delta)
            runner.begin(seq, row.delta)
            live.append((index, seq, row))
        live.sort(key=lambda item: item[1].digest)
        planned = []
        for _, seq, _ in live:
            count = min(chunk if seq.computed else first, seq.uncomputed)
            planned.append(PlannedRow(seq, seq.computed, count, samples=False))
        planned.sort(key=lambda plan: (plan.count > 1, plan.seq.digest))
        deltas = {seq.id: row.delta for _, seq, row in live}
        out = runner.run(planned, [deltas[plan.seq.id] for plan in planned])
        for plan, where in zip(planned, out.rows, strict=True):
            parts[plan.seq.id].append(out.logits[where.first : where.first + where.count].float().clone())
            plan.seq.advance(plan.count)
        for _, seq, _ in live:
            if not seq.uncomputed and seq.slot is not None:
                runner.end(seq.slot)
                free.append(seq.slot)
        live = [item for item in live if item[1].uncomputed]
    return [torch.cat(part) for part in parts]
