"""Chooses the next token of every row of a step.

For each row, in this order: ``logit_bias``; repetition, then frequency and presence penalties; the ban on
ending before ``min_tokens``; temperature; ``min_p``, ``top_k``, ``top_p``. The token is found by inverting
the cumulative distribution at one uniform number that depends on the row's seed and step only, so a row
draws the same tokens alone and in any batch. Rows that are greedy and change nothing cost one maximum over
the batch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.drawing import draw, draw_filtered
from server.engine.logprobs import token_logprobs
from server.errors import InvalidRequest
from server.types import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it would overflow


class RowSampler:
    """One row's sampling state: its parameters, its random source, and how often each token has occurred.

    Raises InvalidRequest if ``logit_bias`` names a token that is not in the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], *, vocab: int, eos_token_ids: Iterable[int]
    ) -> None:
        self.params = params
        self.step = 0  # output tokens so far
        self.greedy = params.temperature < GREEDY_BELOW
        self.filtered = params.top_p < 1 or 0 < params.top_k < vocab or params.min_p > 0
        self._seed = secrets.randbits(64) if params.seed is None else params.seed
        for token in params.logit_bias:
            if not 0 <= token < vocab:
                raise InvalidRequest(
                    f"logit_bias names token {token}; there are {vocab} tokens", param="logit_bias"
                )
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        ends = {*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)}
        self._ends = torch.tensor(sorted(token for token in ends if 0 <= token < vocab), dtype=torch.long)
        repeats = params.repetition_penalty != 1
        self._penalised = repeats or params.frequency_penalty != 0 or params.presence_penalty != 0
        self._seen = Occurrences(prompt if repeats else ())

    @property
    def plain(self) -> bool:
        """Whether the largest logit, as it is, is this step's answer."""
        return self.greedy and not self.adjusts

    @property
    def adjusts(self) -> bool:
        """Whether this step's logits need :meth:`adjust`."""
        return self._penalised or len(self._bias_ids) > 0 or self.step < self.params.min_tokens

    def uniform(self) -> float:
        """This step's number in [0, 1): a hash of seed and step, 53 bits."""
        digest = hashlib.blake2b(f"{self._seed}:{self.step}".encode(), digest_size=8).digest()
        return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)

    def adjust(self, logits: Tensor) -> None:
        """Apply biases, penalties and bans to ``logits`` ``[vocab]`` float32, in place."""
        params, device = self.params, logits.device
        if len(self._bias_ids):
            self._bias_ids, self._biases = self._bias_ids.to(device), self._biases.to(device)
            logits[self._bias_ids] += self._biases
        if self._penalised and self._seen.used:
            ids, counts = (part.to(device) for part in self._seen.tensors())
            values = logits[ids]
            if params.repetition_penalty != 1:
                penalty = params.repetition_penalty
                values = torch.where(values > 0, values / penalty, values * penalty)
            values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            logits[ids] = values
        if self.step < params.min_tokens:
            self._ends = self._ends.to(device)
            logits[self._ends] = -torch.inf

    def advance(self, token: int) -> None:
        """The row's next token is ``token``."""
        self.step += 1
        if self._penalised:
            self._seen.add(token)


class Occurrences:
    """How often each token occurred in the output: parallel arrays that grow, so that a step costs O(1).

    Tokens of ``prompt`` are listed too, with a count of 0.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        tokens = list(dict.fromkeys(prompt))
        self.used = len(tokens)
        self._at = {token: at for at, token in enumerate(tokens)}
        self._ids: NDArray[np.int64] = np.zeros(max(16, 2 * len(tokens)), dtype=np.int64)
        self._ids[: len(tokens)] = tokens
        self._counts: NDArray[np.float32] = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """Count one more ``token``."""
        at = self._at.get(token)
        if at is None:
            if self.used == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            at = self._at[token] = self.used
            self._ids[at] = token
            self.used += 1
        self._counts[at] += 1

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Token ids (int64) and counts (float32); views, valid until the next ``add``."""
        return torch.from_numpy(self._ids[: self.used]), torch.from_numpy(self._counts[: self.used])


@dataclass(frozen=True, slots=True)
class Sampled:
    """``tokens[i]`` (-1 if in ``failed``) and ``logprobs[i]`` (None if not asked for) are row i's."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]
    failed: list[int] = field(default_factory=list)


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[RowSampler]) -> Sampled:
    """One token for each row, whose state it advances. ``logits`` ``[rows, vocab]`` stay as given.

    A row whose logits hold NaN or +Inf, or whose bans leave nothing to choose, is reported as failed and not
    advanced; the other rows do not notice.
    """
    tokens = _argmax(logits)
    chosen = [i for i, row in enumerate(rows) if tokens[i] >= 0 and not row.plain]
    if chosen:
        work = _copy(logits, chosen)
        for i, token in zip(chosen, _choose(work, [rows[i] for i in chosen]), strict=True):
            tokens[i] = token
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    asking = [i for i, row in enumerate(rows) if tokens[i] >= 0 and row.params.logprobs is not None]
    if asking:
        top = [rows[i].params.logprobs or 0 for i in asking]
        entries = token_logprobs(_copy(logits, asking), [tokens[i] for i in asking], top)
        for i, entry in zip(asking, entries, strict=True):
            logprobs[i] = entry
    for row, token in zip(rows, tokens, strict=True):
        if token >= 0:
            row.advance(token)
    return Sampled(tokens, logprobs, [i for i, token in enumerate(tokens) if token < 0])


def _choose(work: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Tokens for rows that need more than their largest logit (-1: none left). ``work`` is overwritten."""
    tokens = [0] * len(rows)
    adjusted = [i for i, row in enumerate(rows) if row.adjusts]
    if adjusted:
        for i in adjusted:
            rows[i].adjust(work[i])
        tokens = _argmax(work)
    drawn = [i for i, row in enumerate(rows) if tokens[i] >= 0 and not row.greedy]
    for filtered in (False, True):
        group = [i for i in drawn if rows[i].filtered == filtered]
        if not group:
            continue
        params = [rows[i].params for i in group]
        temperatures = torch.tensor([p.temperature for p in params], device=work.device)
        scaled = work if len(group) == len(work) else _copy(work, group)
        probs = scaled.div_(temperatures[:, None]).softmax(dim=-1)
        uniforms = torch.tensor([rows[i].uniform() for i in group], dtype=torch.float64, device=work.device)
        if filtered:
            ids = draw_filtered(
                probs,
                uniforms,
                [p.top_k for p in params],
                [p.top_p for p in params],
                [p.min_p for p in params],
            )
        else:
            ids = draw(probs, uniforms)
        for i, token in zip(group, ids.tolist(), strict=True):
            tokens[i] = token
    return tokens


def _argmax(logits: Tensor) -> list[int]:
    """Each line's largest logit, the first of equals; -1 where it is NaN or infinite (NaN wins a maximum)."""
    largest = logits.max(dim=-1)
    tokens: list[int] = torch.where(largest.values.isfinite(), largest.indices, -1).tolist()
    return tokens


def _copy(logits: Tensor, lines: list[int]) -> Tensor:
    """Some lines, in float32, for the caller to change."""
    if len(lines) == len(logits):
        return logits.to(torch.float32, copy=True)
    return logits[torch.tensor(lines, device=logits.device)].float()
