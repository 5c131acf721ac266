"""Runs encoders on packed rows of any length: no padding, every row attends to itself, each with its own delta.

The tokens of all rows lie one after another in one sequence; linears, norms and their patches see only tokens. Attention
stays within a row (``ragged.py``), each row with its own delta's prefix before its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltas.attach import attach
from deltas.bank import PackedDelta
from deltas.batch import Plan
from deltas.groups import SiteGroup, site_groups
from deltas.ops import Mode, Ops
from deltas.sites import SiteKind
from server.engine.backbone import Backbone
from server.engine.packed import See, as_it_is, plan_rows, with_prompts
from server.engine.ragged import SITE, RaggedAttention

# What a family's language-model head makes of hidden states [n, hidden]: its logits [n, vocab].
_HEADS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda model, hidden: model.cls(hidden),
    "distilbert": lambda model, hidden: model.vocab_projector(
        model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
    ),
    "modernbert": lambda model, hidden: model.decoder(model.head(hidden)),
    "roberta": lambda model, hidden: model.lm_head(hidden),
}

Attention = Callable[[Rows[int], Rows[PackedDelta | None]], Any]
"""Makes a pass's attention, for rows of these lengths and deltas."""


@dataclass(frozen=True)
class EncoderRow:
    """A row's own token ids, and its delta. Prompt tokens of the delta come on top.

    ``types`` are token types (zeros where None; not read where the backbone has none); ``positions`` count from 0
    whatever the backbone's table begins with.
    """

    ids: list[int]
    delta: PackedDelta | None = None
    types: list[int] | None = None
    positions: list[int] | None = None

    @property
    def prompt(self) -> Tensor | None:
        return None if self.delta is None else self.delta.prompt

    @property
    def early(self) -> Tensor | None:
        """Prompt embeddings that go through the embedding norm, like tokens."""
        return None if self.delta is None or self.delta.prompt_after_norm else self.delta.prompt

    @property
    def late(self) -> Tensor | None:
        """Prompt embeddings that are put behind the embedding norm, without types and positions."""
        return self.delta.prompt if self.delta is not None and self.delta.prompt_after_norm else None

    @property
    def shift(self) -> int:
        """The position of the row's first own token: a prompt or prefix may have the ones before."""
        return 0 if self.delta is None or self.delta.prompt_after_norm else self.delta.shift


@dataclass(eq=False)
class EncoderRunner:
    """An encoder with its hooks. Not thread-safe: the step loop owns it."""

    backbone: Backbone
    mode: Mode | None = None
    prepack: bool = True
    _prompts: list[tuple[int, Tensor]] = field(default_factory=list)  # to be put behind the embedding norm
    _body: Plan | None = None  # for what follows then

    def __post_init__(self) -> None:
        spec, model = self.backbone.spec, self.backbone.model
        self.groups: list[SiteGroup] = site_groups(spec)
        self.ops = Ops(len(self.groups), self.backbone.device, self.backbone.dtype, self.mode)
        self.hooks = attach(model, spec, self.ops, prepack=self.prepack)
        modules = dict(model.named_modules())
        for site in spec.of_kind(SiteKind.KV):
            module = modules[site.path]
            object.__setattr__(module, SITE, site.name)
            module.register_forward_pre_hook(_enter, with_kwargs=True)
        # RoBERTa's table begins with rows that are no token's position
        self._first = model.config.pad_token_id + 1 if spec.family == "roberta" else 0
        self._typed = "embed.types" in spec.sites
        self._base = model.base_model
        self._base.embeddings.register_forward_hook(self._insert)

    @torch.inference_mode()
    def run(self, rows: Rows[EncoderRow], see: See = as_it_is) -> list[Tensor]:
        """The last hidden states ``[prompt + own tokens, hidden]`` of every row, in the backbone's dtype.

        Rows of one delta should be adjacent: they then share one segment.
        """
        hidden, lengths = self.forward(rows, self._attention, see)
        return list(torch.split(hidden, lengths))

    def forward(
        self, rows: Rows[EncoderRow], attention: Attention, see: See = as_it_is
    ) -> tuple[Tensor, list[int]]:
        """The packed last hidden states ``[tokens, hidden]`` and how many are each row's, by this attention; gradients
        flow through them if the ops are for training."""
        device = self.backbone.device
        deltas = [row.delta for row in rows]
        own = [len(row.ids) for row in rows]
        starts = [n + _length(row.early) for n, row in zip(own, rows, strict=True)]
        lengths = [n + _length(row.late) for n, row in zip(starts, rows, strict=True)]
        try:
            embedded = self._embed(rows, own, see)
            types = {"token_type_ids": _types(rows)[None].to(device)} if self._typed else {}
            self._prompts, self._body = self._late(rows, starts), see(plan_rows(self.ops, deltas, lengths))
            self.hooks.plan = self._body if not self._prompts else see(plan_rows(self.ops, deltas, starts))
            hidden: Tensor = self._base(
                inputs_embeds=embedded[None],
                position_ids=self._positions(rows)[None].to(device),
                deltaserve_attention=attention(lengths, deltas),
                **types,
            ).last_hidden_state[0]
        finally:
            self.hooks.plan = self._body = None
            self._prompts = []
        return hidden, lengths

    def _attention(self, lengths: Rows[int], deltas: Rows[PackedDelta | None]) -> RaggedAttention:
        return RaggedAttention(lengths, deltas, self.backbone.device, kernels=self.ops.kernels)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, delta: PackedDelta | None, see: See = as_it_is) -> Tensor | None:
        """``[n, vocab]`` of last hidden states of rows of one delta, by the hooked language-model head, if there is one."""
        if "head" not in self.backbone.spec.sites:
            return None
        self.hooks.plan = see(plan_rows(self.ops, [delta], [len(hidden)]))
        try:
            logits = _HEADS[self.backbone.spec.family](self.backbone.model, hidden)
        finally:
            self.hooks.plan = None
        return logits

    def forget(self, delta: PackedDelta) -> None:
        """A delta left the device: nothing kept here may name it any more."""
        self.ops.forget(delta)

    def _embed(self, rows: Rows[EncoderRow], own: Rows[int], see: See) -> Tensor:
        """Token embeddings, packed, with the prompts that come before the embedding norm."""
        ids = torch.tensor([token for row in rows for token in row.ids], device=self.backbone.device)
        self.hooks.plan = see(plan_rows(self.ops, [row.delta for row in rows], own))
        embedded: Tensor = self.backbone.model.get_input_embeddings()(ids)
        return with_prompts(embedded, own, [row.early for row in rows])

    def _positions(self, rows: Rows[EncoderRow]) -> Tensor:
        """Of prompt and own tokens, as the backbone's table counts them: int64 ``[tokens]``."""
        found: list[int] = []
        for row in rows:
            first = self._first + row.shift
            found += range(first - _length(row.early), first)
            found += [first + n for n in (row.positions or range(len(row.ids)))]
        return torch.tensor(found)

    def _late(self, rows: Rows[EncoderRow], starts: Rows[int]) -> list[tuple[int, Tensor]]:
        found, at = [], 0
        for row, start in zip(rows, starts, strict=True):
            if row.late is not None:
                found.append((at, row.late))
            at += start
        return found

    def _insert(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        if not self._prompts:
            return output
        self.hooks.plan = self._body
        parts, last = [], 0
        for at, prompt in self._prompts:
            parts += [output[0, last:at], prompt]
            last = at
        return torch.cat([*parts, output[0, last:]])[None]


def _enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tells the step's attention what a layer's attention is given."""
    attention: RaggedAttention = kwargs["deltaserve_attention"]
    attention.entered = (args[0] if args else kwargs["hidden_states"])[0]


def _length(prompt: Tensor | None) -> int:
    return 0 if prompt is None else len(prompt)


def _types(rows: Rows[EncoderRow]) -> Tensor:
    found: list[int] = []
    for row in rows:
        found += [0] * _length(row.early)
        found += row.types or [0] * len(row.ids)
    return torch.tensor(found)
