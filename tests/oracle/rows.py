"""Runs rows through the real runner without a process around it: what a mixed batch gives, token by token."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deltas import methods
from deltas.bank import PackedDelta
from deltas.delta import Delta
from deltas.ops import Mode
from deltas.pack import pack
from deltas.weights import FrozenTensors
from server.engine.backbone import Backbone, load
from server.engine.cuda_graphs import Graph
from server.engine.kv import KV, SlotKV
from server.engine.paged import PagedKV
from server.engine.plan import PlannedRow
from server.engine.runner import Runner
from server.engine.sequence import Sequence
from server.types import DeltaRef, SamplingParams

SLOTS = 33
CPU = torch.device("cpu")


@dataclass(eq=False)
class Row:
    """A prompt and its delta; filled with the greedy tokens and the logits ``[vocab]`` that chose each."""

    prompt: list[int]
    delta: PackedDelta | None = None
    name: str = "base"
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def make_runner(
    folder: Path,
    dtype: torch.dtype,
    mode: Mode | None = None,
    capacity: int = 512,
    *,
    paged: bool = False,
    graph: Callable[[], Graph] | None = None,
    device: torch.device = CPU,
) -> Runner:
    """A backbone from a Hugging Face folder with KV for ``SLOTS - 1`` rows."""
    backbone: Backbone = load(folder.name, folder, device, dtype)
    kv: KV
    if paged:
        kv = PagedKV(backbone.spec, SLOTS, capacity, SLOTS * capacity, dtype, backbone.device)
    else:
        kv = SlotKV(backbone.spec, SLOTS, capacity, dtype, backbone.device)
    return Runner(backbone, kv, scratch_slot=SLOTS - 1, mode=mode, graph=graph)


def place(runner: Runner, delta: Delta) -> PackedDelta:
    """What the residency does with a loaded delta: lower, pack, compute a prompt's keys and values."""
    spec = runner.backbone.spec
    weights = FrozenTensors(runner.backbone.folder)
    patches = methods.lower(delta, spec, weights)
    return runner.finish(pack(patches, spec, runner.backbone.dtype).to(runner.backbone.device))


def generate(runner: Runner, rows: Several[Row], steps: int, *, chunk: int = 512) -> None:
    """Greedy decoding of all rows in one batch, prompts in chunks of ``chunk`` tokens: prefill chunks of late rows
    share steps with decode rows of early ones, and rows of one delta are adjacent, as the scheduler plans them."""
    live: list[tuple[Sequence, Row]] = []
    for slot, row in enumerate(rows):
        ref = None if row.delta is None else DeltaRef(str(id(row.delta)), "")
        seq = Sequence(slot, "t", row.prompt, SamplingParams(max_tokens=steps), delta=ref)
        seq.slot = slot
        if row.delta is not None:
            seq.prefix = row.delta.prefix_length
            if row.delta.prefix is not None:
                runner.kv.put_prefix(slot, row.delta.prefix)
        live.append((seq, row))
    while live:
        live.sort(key=lambda pair: pair[0].digest)
        planned: list[tuple[PlannedRow, Row]] = []
        budget = chunk
        for seq, row in live:
            if seq.decoding:
                planned.append((PlannedRow(seq, seq.computed, 1, True), row))
        for seq, row in live:
            if not seq.decoding and budget > 0:
                count = min(budget, seq.uncomputed)
                budget -= count
                planned.append((PlannedRow(seq, seq.computed, count, count == seq.uncomputed), row))
        out = runner.run([p for p, _ in planned], [row.delta for _, row in planned])
        for (row_plan, row), where in zip(planned, out.rows, strict=True):
            token = None
            if row_plan.samples:
                logits = out.logits[where.first].float().clone()
                token = int(logits.argmax())
                row.logits.append(logits)
                row.tokens.append(token)
            row_plan.seq.advance(row_plan.count, token)
        live = [(seq, row) for seq, row in live if len(row.tokens) < steps]


def same(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())
