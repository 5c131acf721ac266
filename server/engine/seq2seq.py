"""Runs encoder-decoders: a row's source is encoded once, its cross-attention keys and values are kept, and its decoder's
tokens share steps with those of other rows, whatever their deltas.

The encoder's tokens and the decoder's have plans of their own. Which modules make a stack is a driver's business
(``stacks.py``).
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltas.attach import attach
from deltas.bank import PackedDelta
from deltas.errors import InvalidDelta
from deltas.groups import SiteGroup, site_groups
from deltas.ops import Mode, Ops
from deltas.patches import KVPrefix
from deltas.sites import SiteKind
from server.engine.backbone import Backbone
from server.engine.composition import Compositions
from server.engine.cross import CrossAttention
from server.engine.kv import Attention, SlotKV
from server.engine.packed import See, as_it_is, plan_rows, with_prompts
from server.engine.plan import PlannedRow
from server.engine.ragged import SITE, RaggedAttention
from server.engine.runner import RowOutput, StepOutput, lines_of, slot_of
from server.engine.sequence import Sequence
from server.engine.stacks import decoder_of, stacks_of
from server.engine.t5_bias import Before, TokenBias

# tokens that a delta may add to a source, as a prompt and a prefix; published ones have 5 to 200
VIRTUAL = 256


@dataclass(eq=False)
class Held:
    """What the runner knows of the row in a slot. ``before`` and ``cross`` are its delta's prefixes by decoder layer;
    ``shift`` is the position of the decoder's first token, where positions are learned."""

    slot: int
    source: list[int]
    delta: PackedDelta | None
    before: list[Before]
    cross: list[Before]
    shift: int
    read: int = 0  # tokens of the encoder's whose keys and values are there, a prompt's among them

    @property
    def prompt(self) -> Tensor | None:
        return None if self.delta is None else self.delta.prompt


@dataclass(eq=False)
class Seq2SeqRunner:
    """The model with its hooks; ``kv`` is the decoder's own, ``cross`` is made of the encoder's output.

    The last slot of both is scratch. Not thread-safe: the step loop owns it.
    """

    backbone: Backbone
    rows: int
    capacity: int  # decoder tokens of a row, its delta's prefix among them
    source_capacity: int  # encoder tokens of a row, without its delta's
    mode: Mode | None = None
    prepack: bool = True
    _held: dict[int, Held] = field(default_factory=dict)  # by slot

    def __post_init__(self) -> None:
        backbone, spec = self.backbone, self.backbone.spec
        self.stacks = stacks_of(backbone)
        self.groups: list[SiteGroup] = site_groups(spec)
        self.ops = Ops(len(self.groups), backbone.device, backbone.dtype, self.mode)
        self.hooks = attach(backbone.model, spec, self.ops, prepack=self.prepack)
        self._compositions = Compositions(self.ops, self.groups)
        modules = dict(backbone.model.named_modules())
        for site in spec.of_kind(SiteKind.KV):
            object.__setattr__(modules[site.path], SITE, site.name)
        decoder = decoder_of(spec)
        self.layers = range(decoder.layers)
        self.scratch_slot = self.rows
        slots, dtype, device = self.rows + 1, backbone.dtype, backbone.device
        self.kv = SlotKV(decoder, slots, self.capacity, dtype, device)
        self.cross = SlotKV(decoder, slots, self.source_capacity + VIRTUAL, dtype, device)

    # -- deltas ------------------------------------------------------------------------------------------------

    def before(self, delta: PackedDelta) -> int:
        """Keys that the delta puts before a row's own in the decoder's self-attention, where they are most."""
        return max(part.length for part in self._befores(delta, "attn"))

    def in_source(self, delta: PackedDelta) -> int:
        """Positions that the delta's prompt takes before a source's own tokens, where positions can run out."""
        return 0 if delta.prompt is None or self.stacks.positions is None else len(delta.prompt)

    def holds(self, seq: Sequence, delta: PackedDelta) -> bool:
        """Whether there are positions for the row's source behind its delta's prompt."""
        positions = self.stacks.positions
        return positions is None or self.in_source(delta) + len(seq.source) <= positions

    def finish(self, delta: PackedDelta) -> PackedDelta:
        """Nothing of a delta can be computed ahead. Raises :class:`InvalidDelta` for one with too many virtual tokens."""
        most = max(part.length for part in self._befores(delta, "cross"))
        if delta.prompt is not None:
            most += len(delta.prompt)
        if most > VIRTUAL:
            raise InvalidDelta(
                f"{most} virtual tokens for the encoder's output; this server takes at most {VIRTUAL}",
                field="embeddings" if delta.prompt is not None else None,
            )
        return delta

    def forget(self, delta: PackedDelta) -> None:
        """A delta left the device: nothing kept here may name it any more."""
        self.ops.forget(delta)
        self._compositions.forget(delta)

    def _befores(self, delta: PackedDelta | None, attention: str) -> list[Before]:
        return [Before.of(prefix) for prefix in self._prefixes(delta, attention)]

    def _prefixes(self, delta: PackedDelta | None, attention: str) -> list[KVPrefix | None]:
        """By layer, of the decoder's ``attn`` or ``cross``."""
        found = {} if delta is None else delta.prefixes
        return [found.get(f"decoder.layers.{layer}.{attention}.kv") for layer in self.layers]

    # -- rows --------------------------------------------------------------------------------------------------

    def begin(self, seq: Sequence, delta: PackedDelta | None) -> None:
        """A row has been given its slot: what its delta puts before it goes there."""
        slot = slot_of(seq)
        self._held[slot] = self.hold(slot, seq.source, delta)

    def hold(self, slot: int, source: list[int], delta: PackedDelta | None) -> Held:
        """Makes a slot ready for a source that is still to be encoded."""
        for attention, kv in (("attn", self.kv), ("cross", self.cross)):
            for layer, prefix in enumerate(self._prefixes(delta, attention)):
                if prefix is not None:
                    kv.keys[layer][slot, :, : len(prefix.keys)] = prefix.keys.transpose(0, 1)
                    kv.values[layer][slot, :, : len(prefix.values)] = prefix.values.transpose(0, 1)
        before, cross = self._befores(delta, "attn"), self._befores(delta, "cross")
        first = self._prefixes(delta, "attn")[0]  # positions are looked up before the first layer
        shift = len(first.keys) if first is not None and first.shifts_positions else 0
        return Held(slot, source, delta, before, cross, shift)

    def end(self, slot: int) -> None:
        """A row has left its slot."""
        del self._held[slot]

    def empty(self, slot: int) -> None:
        """Nobody will use what is in a slot."""
        self.kv.empty(slot)
        self.cross.empty(slot)

    @torch.inference_mode()
    def run(self, rows: Rows[PlannedRow], deltas: Rows[PackedDelta | None]) -> StepOutput:
        """Encodes the sources of rows that begin, then one pass of the decoder over all rows' next tokens."""
        held = [self._held[slot_of(row.seq)] for row in rows]
        if fresh := [part for part in held if not part.read]:
            self.encode(fresh)
        ids: list[int] = []
        lines: list[int] = []
        outputs: list[RowOutput] = []
        for row in rows:
            ids += row.seq.tokens(row.start, row.count)
            wanted = lines_of(row)
            outputs.append(RowOutput(len(lines), wanted))
            lines += range(len(ids) - wanted, len(ids))
        sizes = [(row.count, out.count) for row, out in zip(rows, outputs, strict=True)]
        composition = self._compositions.of(deltas, sizes)
        try:
            self.hooks.decoder_plan = composition.body
            starts, counts = [row.start for row in rows], [row.count for row in rows]
            hidden = self.decode(ids, held, starts, counts)
            if len(lines) != len(ids):
                hidden = hidden[torch.tensor(lines, dtype=torch.int64, device=hidden.device)]
            self.hooks.decoder_plan = composition.head
            logits = self.backbone.logits(hidden)
        finally:
            self.hooks.decoder_plan = None
        return StepOutput(logits, outputs)

    # -- passes ------------------------------------------------------------------------------------------------

    def encode(self, rows: Rows[Held], see: See = as_it_is) -> Tensor:
        """Encodes these rows' sources and keeps their cross-attention keys and values.

        Returns the last hidden states ``[tokens, hidden]``, prompts' among them. Rows with one source and one delta
        (the answers of one request, the choices of a score) are encoded once.
        """
        device = self.backbone.device
        alike: dict[tuple[int, tuple[int, ...]], list[Held]] = {}
        for row in rows:
            alike.setdefault((id(row.delta), tuple(row.source)), []).append(row)
        firsts = [same[0] for same in alike.values()]
        deltas, own = [row.delta for row in firsts], [len(row.source) for row in firsts]
        lengths = [
            n + (0 if row.prompt is None else len(row.prompt)) for n, row in zip(own, firsts, strict=True)
        ]
        ids = torch.tensor([token for row in firsts for token in row.source], device=device)
        positions = torch.tensor([at for length in lengths for at in range(length)], device=device)
        try:
            self.hooks.plan = see(plan_rows(self.ops, deltas, own))
            embedded = with_prompts(self.stacks.embed(ids), own, [row.prompt for row in firsts])
            self.hooks.plan = see(plan_rows(self.ops, deltas, lengths))
            attention = RaggedAttention(
                lengths, deltas, device, kernels=self.ops.kernels, bias=self.stacks.encoder_bias
            )
            encoded = self.stacks.encode(embedded, positions, attention)
            self._keep(encoded, lengths, list(alike.values()))
        finally:
            self.hooks.plan = None
        return encoded

    def decode(self, ids: list[int], rows: Rows[Held], starts: Rows[int], counts: Rows[int]) -> Tensor:
        """The decoder's last hidden states ``[tokens, hidden]`` of rows that are encoded, by ``hooks.decoder_plan``.

        Row i's own tokens ``starts[i] .. starts[i] + counts[i]`` are computed, those before them are in its slot.
        """
        device, slots = self.backbone.device, [row.slot for row in rows]
        # layers with the same prefixes have it in common
        by_prefixes: dict[tuple[Before, ...], Attention] = {}
        attention: list[Attention] = []
        for layer in self.layers:
            before = tuple([row.before[layer] for row in rows])
            if before not in by_prefixes:
                by_prefixes[before] = self._attention(slots, before, starts, counts)
            attention.append(by_prefixes[before])
        lengths = [[row.cross[layer].length + row.read for row in rows] for layer in self.layers]
        positions = [
            row.shift + at
            for row, start, count in zip(rows, starts, counts, strict=True)
            for at in range(start, start + count)
        ]
        return self.stacks.decode(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            attention,
            CrossAttention(self.cross, self.ops.rows, slots, counts, lengths),
        )

    def _attention(
        self, slots: list[int], before: Rows[Before], starts: Rows[int], counts: Rows[int]
    ) -> Attention:
        held = [part.length + start for part, start in zip(before, starts, strict=True)]
        bias = self.stacks.decoder_bias
        by_token = None if bias is None else TokenBias.of(bias, before, starts, counts, self.backbone.device)
        return Attention(self.kv, self.ops.rows, slots, held, list(counts), by_token)

    def _keep(self, encoded: Tensor, lengths: Rows[int], rows: Rows[Rows[Held]]) -> None:
        """Puts each decoder layer's keys and values of ``encoded`` behind the prefixes of the rows' slots.

        ``rows[i]`` share the i-th of the packed sources, of ``lengths[i]`` tokens.
        """
        tokens: list[int] = []
        slots: list[int] = []
        places: list[tuple[Held, int]] = []
        first = 0
        for length, same in zip(lengths, rows, strict=True):
            for row in same:
                self.cross.note(row.slot, 0, length + max(part.length for part in row.cross))
                tokens += range(first, first + length)
                slots += [row.slot] * length
                places += [(row, at) for at in range(length)]
                row.read = length
            first += length
        device = encoded.device
        token_slots = torch.tensor(slots, device=device)
        index = torch.tensor(tokens, device=device) if len(tokens) != first else None
        known: dict[tuple[int, ...], Tensor] = {}
        for layer in self.layers:
            behind = tuple([row.cross[layer].length for same in rows for row in same])
            if behind not in known:
                positions = [row.cross[layer].length + at for row, at in places]
                known[behind] = torch.tensor(positions, device=device)
            k, v = self.stacks.cross(layer, encoded)
            if index is not None:
                k, v = k[index], v[index]
            self.cross.write(layer, k, v, token_slots, known[behind], self.ops.rows)
