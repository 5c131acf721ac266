"""Runs a plan on the device: packs the rows' tokens, plans their deltas, one forward, logits where they are wanted."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deltas.attach import attach
from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from deltas.errors import InvalidDelta
from deltas.groups import SiteGroup, site_groups
from deltas.ops import Mode, Ops
from server.engine.backbone import Backbone
from server.engine.composition import Compositions
from server.engine.cuda_graphs import DecodeGraphs, DecodeStep, Graph
from server.engine.kv import KV, Attention
from server.engine.lean import LeanDecoder
from server.engine.plan import PlannedRow
from server.engine.sequence import Sequence

LONGEST_PROMPT = 1024  # tokens of a soft prompt; published ones have 5 to 200


@dataclass(frozen=True)
class RowOutput:
    """The logits that belong to one planned row: ``[1, vocab]`` for its next token, or, where prompt log-probabilities
    are wanted, one line for each of its tokens in this step (the last is the next token's)."""

    first: int
    count: int


@dataclass(frozen=True)
class StepOutput:
    """``logits`` ``[lines, vocab]``; ``rows[i]`` says which lines are planned row i's (none for an inner chunk)."""

    logits: Tensor
    rows: list[RowOutput]


class StepRunner(Protocol):
    """What the step loop needs of who runs its plans."""

    @property
    def backbone(self) -> Backbone: ...

    def run(self, rows: Rows[PlannedRow], deltas: Rows[PackedDelta | None]) -> StepOutput: ...

    def before(self, delta: PackedDelta) -> int: ...

    def holds(self, seq: Sequence, delta: PackedDelta) -> bool: ...

    def begin(self, seq: Sequence, delta: PackedDelta | None) -> None: ...

    def end(self, slot: int) -> None: ...

    def empty(self, slot: int) -> None: ...

    def finish(self, delta: PackedDelta) -> PackedDelta: ...

    def forget(self, delta: PackedDelta) -> None: ...


@dataclass
class Spent:
    """Seconds, summed over steps: Python that prepares, the backbone's forward with its deltas, the head."""

    prepare: float = 0.0
    forward: float = 0.0
    head: float = 0.0
    steps: int = 0


@dataclass(eq=False)
class Runner:
    """The model with its hooks and KV. Not thread-safe: the step loop owns it.

    ``graph`` makes the graphs that decode steps are held in, on a device that has them; without it every step is sent
    launch by launch.
    """

    backbone: Backbone
    kv: KV
    scratch_slot: int
    mode: Mode | None = None
    prepack: bool = True
    graph: Callable[[], Graph] | None = None
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self.groups: list[SiteGroup] = site_groups(self.backbone.spec)
        self.ops = Ops(len(self.groups), self.backbone.device, self.backbone.dtype, self.mode)
        self.hooks = attach(self.backbone.model, self.backbone.spec, self.ops, prepack=self.prepack)
        self.lean_body = LeanDecoder.of(self.backbone, self.ops.rows)
        self._compositions = Compositions(self.ops, self.groups)
        self.graphs: DecodeGraphs | None = None
        if self.graph is not None and self.lean_body is not None and self.ops.mode == "triton":
            self.graphs = DecodeGraphs(
                self.ops, self.kv, self.scratch_slot, self.groups, self._decode, self.graph
            )

    def before(self, delta: PackedDelta) -> int:
        """Tokens' worth of keys and values that the delta puts before a row's own."""
        return delta.prefix_length

    def holds(self, _seq: Sequence, _delta: PackedDelta) -> bool:
        """A row has no source that might be too long."""
        return True

    def begin(self, seq: Sequence, delta: PackedDelta | None) -> None:
        """A row has been given its slot: what it shares with another, or what its delta puts before it, goes there."""
        slot = slot_of(seq)
        if seq.copied_from == slot:
            return
        self.kv.empty(slot)
        if seq.copied_from is not None:
            self.kv.copy(seq.copied_from, slot, seq.prefix + seq.computed)
        elif delta is not None and delta.prefix is not None:
            self.kv.put_prefix(slot, delta.prefix)

    def end(self, slot: int) -> None:
        """A row has left its slot: its keys and values stay there for others."""

    def empty(self, slot: int) -> None:
        """Nobody will use what is in a slot."""
        self.kv.empty(slot)

    @torch.inference_mode()
    def run(self, rows: Rows[PlannedRow], deltas: Rows[PackedDelta | None]) -> StepOutput:
        """One forward over the rows' next tokens. ``deltas[i]`` is row i's, None for the backbone alone.

        Rows come in packed order: single-token rows first, rows of one delta adjacent.
        """
        began = time.perf_counter()
        device = self.backbone.device
        ids: list[int] = []
        positions: list[int] = []
        starts: list[int] = []
        lines: list[int] = []
        outputs: list[RowOutput] = []
        for row, delta in zip(rows, deltas, strict=True):
            seq = row.seq
            starts.append(seq.prefix + row.start)
            first = row.start + (0 if delta is None else delta.shift)
            if row.count == 1 and row.start >= len(seq.prompt):
                ids.append(seq.output[row.start - len(seq.prompt)])
                positions.append(first)
            else:
                tokens = seq.prompt + seq.output
                ids.extend(tokens[row.start : row.start + row.count])
                positions.extend(range(first, first + row.count))
            wanted = lines_of(row)
            outputs.append(RowOutput(len(lines), wanted))
            lines.extend(range(len(ids) - wanted, len(ids)))
        slots = [slot_of(row.seq) for row in rows]
        if self.graphs is not None and len(rows) == len(ids) == len(lines):
            logits = self.graphs.run(DecodeStep(ids, positions, slots, starts, deltas))
            if logits is not None:
                self.spent.forward += time.perf_counter() - began
                self.spent.steps += 1
                return StepOutput(logits, outputs)
        attention = Attention(self.kv, self.ops.rows, slots, starts, [row.count for row in rows])
        composition = self._compositions.of(
            deltas, [(row.count, out.count) for row, out in zip(rows, outputs, strict=True)]
        )
        id_tensor = torch.tensor([ids], device=device)
        position_tensor = torch.tensor([positions], device=device)
        prepared = time.perf_counter()
        self.hooks.plan = composition.body
        hidden = self.forward(attention, position_tensor, input_ids=id_tensor)[0]
        computed = time.perf_counter()
        self.hooks.plan = composition.head
        if len(lines) != len(ids):
            hidden = hidden[torch.tensor(lines, dtype=torch.int64, device=device)]  # none in inner chunks
        logits = self.backbone.logits(hidden)
        self.hooks.plan = None
        self.spent.prepare += prepared - began
        self.spent.forward += computed - prepared
        self.spent.head += time.perf_counter() - computed
        self.spent.steps += 1
        return StepOutput(logits, outputs)

    @torch.inference_mode()
    def finish(self, delta: PackedDelta) -> PackedDelta:
        """Computes a soft prompt's keys and values, with the delta's other patches on: once per digest.

        Raises :class:`InvalidDelta` for a prompt that is too long: it is one forward, and every row waits for it.
        """
        if delta.prompt is None:
            return delta
        n = int(delta.prompt.shape[0])
        limit = min(LONGEST_PROMPT, self.kv.capacity - 1 - (delta.prefix_length - n))
        if n > limit:
            raise InvalidDelta(f"{n} virtual tokens; this server takes at most {limit}", field="embeddings")
        held = delta.prefix_length - n  # a prefix of its own, that the prompt's tokens attend to as well
        if delta.prefix is not None:
            self.kv.put_prefix(self.scratch_slot, delta.prefix)
        attention = Attention(self.kv, self.ops.rows, [self.scratch_slot], [held], [n])
        positions = torch.arange(n, device=self.backbone.device)[None]
        self.hooks.plan = self.ops.plan([Segment(0, n, delta)], n)
        self.forward(attention, positions, inputs_embeds=delta.prompt[None])
        self.hooks.plan = None
        self.ops.forget(delta)
        return delta.with_prefix(self.kv.read_prefix(self.scratch_slot, held + n))

    def forget(self, delta: PackedDelta) -> None:
        """A delta left the device: nothing kept here may name it any more."""
        self.ops.forget(delta)
        self._compositions.forget(delta)
        if self.graphs is not None:
            self.graphs.forget()

    def _decode(self, attention: Attention, positions: Tensor, ids: Tensor, plan: Plan | None) -> Tensor:
        """Logits ``[rows, vocab]`` of one token a row; the plan is the body's and the head's, whose rows are the same."""
        self.hooks.plan = plan
        hidden = self.forward(attention, positions[None], input_ids=ids[None])[0]
        logits = self.backbone.logits(hidden)
        self.hooks.plan = None
        return logits

    def forward(self, attention: Attention, positions: Tensor, **inputs: Tensor) -> Tensor:
        """The backbone's layers over packed tokens, with ``hooks.plan`` applied: ``[1, tokens, hidden]``.

        ``positions`` ``[1, tokens]``; ``inputs`` are ``input_ids`` or ``inputs_embeds``.
        """
        if self.lean_body is not None:
            return self.lean_body(attention, positions, **inputs)
        out = self.backbone.model.base_model(
            **inputs, position_ids=positions, use_cache=False, deltaserve_attention=attention
        )
        hidden: Tensor = out.last_hidden_state
        return hidden


def lines_of(row: PlannedRow) -> int:
    """How many of a planned row's tokens, the last ones, logits are wanted for."""
    return max(1 if row.samples else 0, row.count - unscored(row))


def unscored(row: PlannedRow) -> int:
    """How many of the row's tokens, from its first on, predict no prompt token whose log-probability is wanted."""
    seq, sampling = row.seq, row.seq.sampling
    if sampling.prompt_logprobs is None or row.start >= len(seq.prompt):
        return row.count
    return min(row.count, max(0, sampling.prompt_logprobs_from - 1 - row.start))


def slot_of(seq: Sequence) -> int:
    """The slot of a row that runs."""
    if seq.slot is None:
        raise RuntimeError(f"row {seq.id} was planned without a KV slot")
    return seq.slot
