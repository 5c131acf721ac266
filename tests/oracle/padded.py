"""Runs a mixed batch through any Hugging Face model with our hooks on: the harness of the oracle tables.

Rows are padded on the right and attend, row by row and in plain float32, to their own prefix and tokens; everything
else is Hugging Face's own forward pass with ``deltas.attach``. Slow and simple on purpose. The engine has faster ways;
``rows.py`` holds those to the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from deltas import heads, methods
from deltas.attach import attach
from deltas.backbones import describe
from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from deltas.delta import Delta
from deltas.groups import site_groups
from deltas.ops import Mode, Ops
from deltas.ops.adapters import opening
from deltas.pack import pack
from deltas.patches import KVPrefix
from deltas.sites import SiteKind
from deltas.weights import FrozenTensors

BACKBONES = Path(__file__).parent / "fixtures" / "backbones"
ATTENTION = "deltaserve-padded"
CLASSES = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}


@dataclass(eq=False)
class PaddedRow:
    """Token ids (and the decoder's, for T5), and the delta that they use."""

    ids: Sequence[int]
    delta: PackedDelta | None = None
    decoder_ids: Sequence[int] | None = None
    name: str = "base"


@dataclass(eq=False)
class _Batch:
    """What the attention function must know of the rows of the forward pass that runs."""

    prefixes: list[dict[str, KVPrefix]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    decoder_lengths: list[int] = field(default_factory=list)
    prompts: list[Tensor | None] = field(default_factory=list)  # to be put after the embedding norm


class PaddedRunner:
    """One backbone of ``fixtures/backbones`` (or any folder) with hooks. Not thread-safe."""

    def __init__(self, family: str | Path, mode: Mode = "reference") -> None:
        self.folder = BACKBONES / family if isinstance(family, str) else family
        config = AutoConfig.from_pretrained(self.folder)
        self.spec = describe(config, "oracle")
        self.weights = FrozenTensors(self.folder)
        AttentionInterface.register(ATTENTION, _attention)
        self.model: Any = CLASSES[self.spec.kind].from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation=ATTENTION
        )
        self.model.eval()
        self.ops = Ops(len(site_groups(self.spec)), torch.device("cpu"), torch.float32, mode)
        self.hooks = attach(self.model, self.spec, self.ops)
        self.batch = _Batch()
        self.hidden: list[Tensor] = []
        self._prompted: Plan | None = None
        modules = dict(self.model.named_modules())
        # the embedding of an encoder-decoder's own is never called: its stacks have copies, and those are hooked
        embed = "encoder.embed" if self.spec.kind == "encoder-decoder" else "embed"
        self._embedding = modules[self.spec.sites[embed].path]
        for site in self.spec.of_kind(SiteKind.KV):
            object.__setattr__(modules[site.path], "oracle_site", site.name)
            object.__setattr__(modules[site.path], "oracle_batch", self)
            modules[site.path].register_forward_pre_hook(_remember, with_kwargs=True)
        positions = self.spec.sites.get("decoder.embed.positions")
        if positions is not None:
            modules[positions.path].register_forward_hook(self._shift_decoder)
        if self.spec.kind == "encoder":
            self.model.base_model.embeddings.register_forward_hook(self._put_prompts)

    def place(self, *parts: Delta | tuple[Delta, float]) -> PackedDelta:
        """Lowered and packed; several deltas are summed with their weights."""
        summed = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
        return pack(methods.lower_sum(summed, self.spec, self.weights), self.spec, torch.float32)

    @torch.no_grad()
    def logits(self, rows: Sequence[PaddedRow]) -> list[Tensor]:
        """Float32 logits ``[own tokens, vocab]`` of every row (of its decoder's tokens, for an encoder-decoder)."""
        own = [len(row.ids) for row in rows]
        ids = _padded([torch.tensor(row.ids) for row in rows])
        self.hooks.plan = self._plan(rows, own, ids.shape[1])
        embedded = self._embedding(ids)
        fronts = [self._front(row) for row in rows]
        before = [0 if front is None else len(front) for front in fronts]
        parts = [
            embedded[i, : own[i]] if front is None else torch.cat([front, embedded[i, : own[i]]])
            for i, front in enumerate(fronts)
        ]
        embeds = _padded(parts)
        positions = torch.zeros(embeds.shape[:2], dtype=torch.long)
        for i, row in enumerate(rows):
            shift = 0 if row.delta is None else row.delta.shift - before[i]
            if row.delta is not None and row.delta.prompt_after_norm:
                shift = 0
            positions[i, : len(parts[i])] = torch.arange(len(parts[i])) + shift
        self.batch.prompts = [
            row.delta.prompt if row.delta is not None and row.delta.prompt_after_norm else None
            for row in rows
        ]
        after = [0 if prompt is None else len(prompt) for prompt in self.batch.prompts]
        self.batch.prefixes = [_prefixes(self, row.delta) for row in rows]
        lengths = [len(part) + n for part, n in zip(parts, after, strict=True)]
        self.batch.lengths = lengths
        width = embeds.shape[1] + max(after)
        self._prompted = self._plan(rows, lengths, width)
        # on an encoder the embeddings are summed and normed before the prompts are there
        self.hooks.plan = self._plan(rows, own, embeds.shape[1]) if max(after) else self._prompted
        logits, hidden = self._forward(rows, embeds, positions)
        self.hooks.plan = self.hooks.decoder_plan = None
        self.hidden = [hidden[i, : lengths[i]] for i in range(len(rows))]
        if self.spec.kind == "encoder-decoder":
            return [logits[i, : self.batch.decoder_lengths[i]] for i in range(len(rows))]
        return [logits[i, lengths[i] - own[i] : lengths[i]] for i in range(len(rows))]

    def classes(self, rows: Sequence[PaddedRow]) -> list[Tensor]:
        """What each row's own head makes of its last hidden states (prompt tokens included)."""
        self.logits(rows)
        found = []
        for row, hidden in zip(rows, self.hidden, strict=True):
            if row.delta is None or row.delta.head is None:
                raise ValueError(f"{row.name} has no head")
            found.append(heads.apply(row.delta.head, hidden))
        return found

    def _forward(self, rows: Sequence[PaddedRow], embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the last hidden states (the encoder's, for an encoder-decoder)."""
        if self.spec.kind == "encoder-decoder":
            decoder = [list(row.decoder_ids or []) for row in rows]
            self.batch.decoder_lengths = [len(ids) for ids in decoder]
            ids = _padded([torch.tensor(part) for part in decoder])
            self.hooks.decoder_plan = self._plan(rows, self.batch.decoder_lengths, ids.shape[1])
            out = self.model(
                inputs_embeds=embeds, decoder_input_ids=ids, use_cache=False, output_hidden_states=True
            )
            return out.logits, out.encoder_last_hidden_state
        elif self.spec.kind == "encoder":
            start = self.model.config.pad_token_id + 1 if self.spec.family == "roberta" else 0
            out = self.model(inputs_embeds=embeds, position_ids=positions + start, output_hidden_states=True)
        else:
            out = self.model(
                inputs_embeds=embeds, position_ids=positions, use_cache=False, output_hidden_states=True
            )
        return out.logits, out.hidden_states[-1]

    def _plan(self, rows: Sequence[PaddedRow], lengths: Sequence[int], width: int) -> Any:
        segments = [
            Segment(i * width, lengths[i], row.delta) for i, row in enumerate(rows) if row.delta is not None
        ]
        return self.ops.plan(segments, len(rows) * width)

    def _front(self, row: PaddedRow) -> Tensor | None:
        if row.delta is None or row.delta.prompt is None or row.delta.prompt_after_norm:
            return None
        return row.delta.prompt

    def _shift_decoder(self, module: Any, _args: Any, output: Tensor) -> Tensor:
        """BART looks positions up once for all rows; a prefix before the decoder shifts those of its row."""
        prefixes = [found.get("decoder.layers.0.attn.kv") for found in self.batch.prefixes]
        starts = [len(p.keys) if p is not None and p.shifts_positions else 0 for p in prefixes]
        own = torch.arange(output.shape[-2])
        return torch.stack([module.weight[own + start + module.offset] for start in starts])

    def _put_prompts(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        prompts = self.batch.prompts
        if all(prompt is None for prompt in prompts):
            return output
        self.hooks.plan = self._prompted
        parts = [
            output[i] if prompt is None else torch.cat([prompt, output[i]])
            for i, prompt in enumerate(prompts)
        ]
        return _padded(parts)


def _prefixes(runner: PaddedRunner, delta: PackedDelta | None) -> dict[str, KVPrefix]:
    if delta is None:
        return {}
    if delta.prefix is None:
        return delta.prefixes
    sites = runner.spec.of_kind(SiteKind.KV)
    shifts = delta.shift > 0
    return {
        site.name: KVPrefix(site.name, keys.transpose(0, 1), values.transpose(0, 1), shifts)
        for site, (keys, values) in zip(sites, delta.prefix, strict=True)
    }


def _padded(parts: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query`` ``[rows, heads, tokens, head_dim]``; every row alone, to its own keys only."""
    runner: PaddedRunner = module.oracle_batch
    batch, site = runner.batch, module.oracle_site
    decoder, cross = site.startswith("decoder."), ".cross." in site
    queries = batch.decoder_lengths if decoder else batch.lengths
    keys = batch.lengths if cross or not decoder else batch.decoder_lengths
    causal = runner.spec.kind == "decoder" or (decoder and not cross)
    out = torch.zeros_like(query)
    for i in range(len(queries)):
        q, k, v = query[i, :, : queries[i]], key[i, :, : keys[i]], value[i, :, : keys[i]]
        prefix = batch.prefixes[i].get(site)
        n = 0
        if prefix is not None:
            n = len(prefix.keys)
            open_k, open_v = _openings(prefix, module.oracle_input[i, : queries[i]])
            k = torch.cat([prefix.keys.transpose(0, 1) * open_k, k], dim=1)
            v = torch.cat([prefix.values.transpose(0, 1) * open_v, v], dim=1)
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) * scaling
        if position_bias is not None:
            scores = scores + _bias(runner, module, position_bias, q.shape[1], keys[i], n, prefix)
        if causal:
            hidden = torch.ones(q.shape[1], keys[i], dtype=torch.bool).triu(1)
            scores[:, :, n:] = scores[:, :, n:].masked_fill(hidden, float("-inf"))
        if sliding_window is not None:
            at = torch.arange(keys[i])
            far = (at[:, None] - at).abs() >= sliding_window
            scores[:, :, n:] = scores[:, :, n:].masked_fill(far, float("-inf"))
        out[i, :, : queries[i]] = scores.softmax(-1) @ v
    return out.transpose(1, 2), None


def _bias(
    runner: PaddedRunner, module: Any, bias: Tensor, queries: int, keys: int, n: int, prefix: KVPrefix | None
) -> Tensor:
    """T5's relative position bias: none for a prefix without positions, else as for n tokens before the row's own."""
    own = bias[0, :, :queries, :keys]
    if prefix is None:
        return own
    if prefix.unbiased:
        return own.new_zeros(own.shape[0], queries, n + keys)
    if ".cross." in module.oracle_site or not (prefix.shifts_positions or prefix.shifts_keys):
        return torch.cat([own.new_zeros(own.shape[0], queries, n), own], dim=2)
    stack = runner.model.decoder if module.oracle_site.startswith("decoder.") else runner.model.encoder
    first = stack.block[0].layer[0].SelfAttention
    seen = 0 if prefix.shifts_keys else n
    shifted: Tensor = first.compute_bias(queries, n + keys, past_seen_tokens=seen)[0]
    return shifted


def _remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What an attention reads: the gates of prefixes read it too."""
    object.__setattr__(module, "oracle_input", args[0] if args else kwargs["hidden_states"])


def _openings(prefix: KVPrefix, tokens: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """How far the gates for keys and values are open, for the row with these tokens."""
    if prefix.gate is None:
        return 1.0, 1.0
    both = opening(prefix.gate, tokens)
    return both[0], both[-1]
