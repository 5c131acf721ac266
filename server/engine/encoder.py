"""Runs encoders on packed rows of any length: no padding, every row attends to itself, each with its own delta.

The tokens of all rows lie one after another in one sequence; linears, norms and their patches see only tokens. Attention
goes row by row, rows of one length together, each with its own delta's prefix before its keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.attach import attach
from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from deltas.groups import site_groups
from deltas.ops import Mode, Ops
from deltas.sites import SiteKind
from server.engine.backbone import Backbone


@dataclass(frozen=True)
class EncoderRow:
    """A row's own token ids, and its delta. Prompt tokens of the delta come on top."""

    ids: list[int]
    delta: PackedDelta | None = None
    types: list[int] | None = None  # token types (segments); zeros where None

    @property
    def prompt(self) -> Tensor | None:
        return None if self.delta is None else self.delta.prompt

    @property
    def before(self) -> int:
        """Prompt tokens before the row's own."""
        return 0 if self.prompt is None else len(self.prompt)


class RaggedAttention:
    """Bidirectional attention of packed rows; ``lengths`` in tokens, ``deltas`` bring prefixes by KV site."""

    def __init__(self, lengths: Rows[int], deltas: Rows[PackedDelta | None], device: torch.device) -> None:
        self._same: dict[tuple[int, int], list[tuple[int, PackedDelta | None]]] = defaultdict(list)
        at = 0
        for length, delta in zip(lengths, deltas, strict=True):
            prefixed = delta is not None and bool(delta.prefixes)
            # rows of one length and delta-less attention go together; a row with a prefix goes alone
            key = (length, at if prefixed else -1)
            self._same[key].append((at, delta if prefixed else None))
            at += length
        self._index = {
            key: torch.cat([torch.arange(start, start + key[0]) for start, _ in rows]).to(device)
            for key, rows in self._same.items()
        }

    def __call__(self, site: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` -> as ``q``, contiguous."""
        out = torch.empty_like(q)
        for (length, _), rows in self._same.items():
            index = self._index[(length, _)]
            count = len(rows)

            def split(t: Tensor, index: Tensor = index, count: int = count, length: int = length) -> Tensor:
                return t[index].view(count, length, t.shape[1], t.shape[2]).transpose(1, 2)

            keys, values = split(k), split(v)
            delta = rows[0][1]
            prefix = None if delta is None else delta.prefixes.get(site)
            if prefix is not None:
                keys = torch.cat([prefix.keys.transpose(0, 1)[None], keys], dim=2)
                values = torch.cat([prefix.values.transpose(0, 1)[None], values], dim=2)
            attended = F.scaled_dot_product_attention(split(q), keys, values, scale=scale)
            out[index] = attended.transpose(1, 2).reshape(count * length, q.shape[1], q.shape[2])
        return out


@dataclass(eq=False)
class EncoderRunner:
    """An encoder with its hooks. Not thread-safe: the step loop owns it."""

    backbone: Backbone
    mode: Mode | None = None
    prepack: bool = True
    _prompts: list[tuple[int, Tensor]] = field(default_factory=list)  # to be put after the embedding norm

    def __post_init__(self) -> None:
        spec, model = self.backbone.spec, self.backbone.model
        self.ops = Ops(len(site_groups(spec)), self.backbone.device, self.backbone.dtype, self.mode)
        self.hooks = attach(model, spec, self.ops, prepack=self.prepack)
        modules = dict(model.named_modules())
        for site in spec.of_kind(SiteKind.KV):
            object.__setattr__(modules[site.path], "deltaserve_site", site.name)
        self._first = model.config.pad_token_id + 1 if spec.family == "roberta" else 0
        self._base = model.base_model
        self._base.embeddings.register_forward_hook(self._insert)

    @torch.inference_mode()
    def run(self, rows: Rows[EncoderRow]) -> list[Tensor]:
        """The last hidden states ``[own tokens, hidden]`` of every row, in the backbone's dtype.

        Rows of one delta should be adjacent: they then share one segment.
        """
        device = self.backbone.device
        early = [0 if row.delta is not None and row.delta.prompt_after_norm else row.before for row in rows]
        late = [row.before - n for row, n in zip(rows, early, strict=True)]
        own = [len(row.ids) for row in rows]
        embedded = self._embed(rows, own)
        starts = [n + m for n, m in zip(early, own, strict=True)]
        positions = torch.cat([torch.arange(n) + self._first + _shift(r) for n, r in zip(starts, rows, strict=True)])
        types = torch.cat([_types(row, n) for row, n in zip(rows, early, strict=True)])
        lengths = [n + m for n, m in zip(starts, late, strict=True)]
        self._prompts, at = [], 0
        for row, n, m in zip(rows, starts, late, strict=True):
            if m and row.prompt is not None:
                self._prompts.append((at, row.prompt))
            at += n
        deltas = [row.delta for row in rows]
        attention = RaggedAttention(lengths, deltas, device)
        self.hooks.plan = self._plan(deltas, lengths)
        extra: dict[str, Any] = {} if self.backbone.spec.family == "modernbert" else {"token_type_ids": types[None].to(device)}
        hidden = self._base(
            inputs_embeds=embedded[None],
            position_ids=positions[None].to(device),
            deltaserve_attention=attention,
            **extra,
        ).last_hidden_state[0]
        self.hooks.plan = None
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return [hidden[end - n : end] for end, n in zip(ends, own, strict=True)]

    def forget(self, delta: PackedDelta) -> None:
        """A delta left the device: nothing kept here may name it any more."""
        self.ops.forget(delta)

    def _embed(self, rows: Rows[EncoderRow], own: Rows[int]) -> Tensor:
        """Token embeddings, packed, with the prompts that come before the embedding norm."""
        device = self.backbone.device
        ids = torch.tensor([token for row in rows for token in row.ids], device=device)
        self.hooks.plan = self._plan([row.delta for row in rows], own)
        embedded: Tensor = self.backbone.model.get_input_embeddings()(ids)
        self.hooks.plan = None
        parts: list[Tensor] = []
        for row, part in zip(rows, embedded.split(list(own)), strict=True):
            if row.prompt is not None and row.delta is not None and not row.delta.prompt_after_norm:
                parts.append(row.prompt)
            parts.append(part)
        return torch.cat(parts)

    def _plan(self, deltas: Rows[PackedDelta | None], lengths: Rows[int]) -> Plan | None:
        segments, at = [], 0
        for delta, length in zip(deltas, lengths, strict=True):
            segments.append(Segment(at, length, delta))
            at += length
        return self.ops.plan(segments, at)

    def _insert(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        if not self._prompts:
            return output
        parts, last = [], 0
        for at, prompt in self._prompts:
            parts += [output[0, last:at], prompt]
            last = at
        return torch.cat([*parts, output[0, last:]])[None]


def _shift(row: EncoderRow) -> int:
    """Positions by which the row's first token is moved, beside prompt tokens that have positions themselves."""
    if row.delta is None or row.delta.prompt_after_norm:
        return 0
    return row.delta.shift - row.before


def _types(row: EncoderRow, before: int) -> Tensor:
    types = row.types or [0] * len(row.ids)
    return torch.tensor([0] * before + types)
