"""What becomes of packed rows on their way to gradients: the last hidden states, by the families' own modules and hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from deltas.attach import attach
from deltas.bank import PackedDelta
from deltas.groups import site_groups
from deltas.hooks import Hooks
from deltas.ops import Ops
from deltas.sites import SiteKind
from server.engine.backbone import Backbone
from server.engine.build_seq2seq import decoder_start
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.packed import plan_rows, with_prompts
from server.engine.ragged import SITE
from server.engine.stacks import decoder_of, stacks_of
from server.tuning.attention import PackedAttention, PackedCross


@dataclass(frozen=True)
class Row:
    """A row's tokens (of an encoder-decoder's source), its answer's, if it is to give one, and its delta."""

    tokens: list[int]
    delta: PackedDelta | None = None
    types: list[int] | None = None
    target: list[int] | None = None


@dataclass(frozen=True, eq=False)
class States:
    """Last hidden states of packed rows, ``[tokens, hidden]``. Row i has ``lengths[i]``, of which the first
    ``before[i]`` belong to its prompt or to what its answer begins after."""

    hidden: Tensor
    lengths: list[int]
    before: list[int]

    @property
    def starts(self) -> list[int]:
        """The place of each row's first state."""
        return [0, *accumulate(self.lengths)][:-1]


class Body(Protocol):
    """A hooked backbone without its head."""

    @property
    def hooks(self) -> Hooks: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have, virtual ones among them; None for any number."""
        ...

    def __call__(self, rows: Sequence[Row]) -> States:
        """All rows in one pass. Rows of one delta are to be adjacent."""
        ...


def body_of(backbone: Backbone) -> Body:
    """Hooks a loaded backbone for training. Its parameters take no gradients."""
    match backbone.spec.kind:
        case "decoder":
            return DecoderBody(backbone)
        case "encoder":
            return EncoderBody(backbone)
        case "encoder-decoder":
            return Seq2SeqBody(backbone)


def _hooked(backbone: Backbone) -> tuple[Ops, Hooks]:
    spec = backbone.spec
    ops = Ops(len(site_groups(spec)), backbone.device, backbone.dtype, "training")
    return ops, attach(backbone.model, spec, ops, prepack=False)


class DecoderBody:
    """Causal rows, each behind its delta's prompt and prefix."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.ops, self.hooks = _hooked(backbone)
        self.positions: int | None = backbone.spec.max_positions

    def __call__(self, rows: Sequence[Row]) -> States:
        device, deltas = self._backbone.device, [row.delta for row in rows]
        own, before = [len(row.tokens) for row in rows], [_prompt_length(row.delta) for row in rows]
        lengths = [n + b for n, b in zip(own, before, strict=True)]
        ids = torch.tensor([token for row in rows for token in row.tokens], device=device)
        positions = [
            at
            for row, n, b in zip(rows, own, before, strict=True)
            for first in [0 if row.delta is None else row.delta.shift]
            for at in (*range(b), *range(first, first + n))
        ]
        attention = PackedAttention(
            lengths, deltas, device, causal=True, site_of=lambda layer: f"layers.{layer}.attn.kv"
        )
        try:
            self.hooks.plan = plan_rows(self.ops, deltas, own)
            embedded = with_prompts(
                self._backbone.model.get_input_embeddings()(ids), own, [_prompt(row.delta) for row in rows]
            )
            self.hooks.plan = plan_rows(self.ops, deltas, lengths)
            hidden: Tensor = self._backbone.model.base_model(
                inputs_embeds=embedded[None],
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                deltaserve_attention=attention,
            ).last_hidden_state[0]
        finally:
            self.hooks.plan = None
        return States(hidden, lengths, before)


class EncoderBody:
    """Rows that see all of themselves, by the engine's own runner."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._runner = EncoderRunner(backbone, mode="training", prepack=False)
        self.ops, self.hooks = self._runner.ops, self._runner.hooks
        self.positions: int | None = backbone.spec.max_positions

    def __call__(self, rows: Sequence[Row]) -> States:
        packed = [EncoderRow(row.tokens, row.delta, row.types) for row in rows]
        hidden, lengths = self._runner.forward(packed, self._attention)
        return States(hidden, lengths, [n - len(row.tokens) for n, row in zip(lengths, rows, strict=True)])

    def _attention(self, lengths: Sequence[int], deltas: Sequence[PackedDelta | None]) -> PackedAttention:
        return PackedAttention(lengths, deltas, self._backbone.device, causal=False)


class Seq2SeqBody:
    """Sources, and the answers of the rows that have one. The states are the decoder's, or, of rows without an answer,
    the encoder's: a pass has rows of one sort."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, spec = backbone, backbone.spec
        self.stacks = stacks_of(backbone)
        self.ops, self.hooks = _hooked(backbone)
        modules = dict(backbone.model.named_modules())
        for site in spec.of_kind(SiteKind.KV):
            object.__setattr__(modules[site.path], SITE, site.name)
        self._layers = range(decoder_of(spec).layers)
        self._begins = decoder_start(backbone)
        self.positions: int | None = self.stacks.positions

    def __call__(self, rows: Sequence[Row]) -> States:
        device, deltas = self._backbone.device, [row.delta for row in rows]
        own = [len(row.tokens) for row in rows]
        before = [_prompt_length(row.delta) for row in rows]
        lengths = [n + b for n, b in zip(own, before, strict=True)]
        ids = torch.tensor([token for row in rows for token in row.tokens], device=device)
        positions = torch.tensor([at for length in lengths for at in range(length)], device=device)
        attention = PackedAttention(lengths, deltas, device, causal=False, bias=self.stacks.encoder_bias)
        try:
            self.hooks.plan = plan_rows(self.ops, deltas, own)
            embedded = with_prompts(self.stacks.embed(ids), own, [_prompt(row.delta) for row in rows])
            self.hooks.plan = plan_rows(self.ops, deltas, lengths)
            encoded = self.stacks.encode(embedded, positions, attention)
            if rows[0].target is None:
                return States(encoded, lengths, before)
            return self._decode(rows, encoded, lengths)
        finally:
            self.hooks.plan = self.hooks.decoder_plan = None

    def _decode(self, rows: Sequence[Row], encoded: Tensor, sources: list[int]) -> States:
        device, deltas = self._backbone.device, [row.delta for row in rows]
        # an answer's tokens are predicted by what is before each of them
        answers = [[*self._begins, *(row.target or [])][:-1] for row in rows]
        lengths = [len(answer) for answer in answers]
        shifts = [_decoder_shift(row.delta) for row in rows]
        positions = [s + at for s, length in zip(shifts, lengths, strict=True) for at in range(length)]
        own = PackedAttention(
            lengths,
            deltas,
            device,
            causal=True,
            bias=self.stacks.decoder_bias,
            site_of=partial("decoder.layers.{}.attn.kv".format),
        )
        cross = PackedCross(
            lengths,
            sources,
            deltas,
            device,
            keys_of=lambda layer: self.stacks.cross(layer, encoded),
            site_of=partial("decoder.layers.{}.cross.kv".format),
        )
        self.hooks.decoder_plan = plan_rows(self.ops, deltas, lengths)
        hidden = self.stacks.decode(
            torch.tensor([token for answer in answers for token in answer], device=device),
            torch.tensor(positions, device=device),
            [own] * len(self._layers),
            cross,
        )
        return States(hidden, lengths, [len(self._begins)] * len(rows))


def _prompt(delta: PackedDelta | None) -> Tensor | None:
    return None if delta is None else delta.prompt


def _prompt_length(delta: PackedDelta | None) -> int:
    prompt = _prompt(delta)
    return 0 if prompt is None else len(prompt)


def _decoder_shift(delta: PackedDelta | None) -> int:
    """The position of the first token: positions are looked up before the first layer, whose prefix may shift them."""
    first = None if delta is None else delta.prefixes.get("decoder.layers.0.attn.kv")
    return len(first.keys) if first is not None and first.shifts_positions else 0
