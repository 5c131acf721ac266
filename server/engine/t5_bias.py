"""T5's relative position biases, for ragged rows: what is added to a score depends on how far apart two tokens are.

Rows of a batch differ in length, and their deltas' prefixes count as tokens before the row, or do not, or take the biases
away. So each query token has an *anchor*, the position from which its keys' places are counted, and a *blank*, how many
of the first keys get no bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltas.patches import KVPrefix

EVERYTHING = 1 << 40  # more keys than any row has
KEPT_ELEMENTS = 1 << 23  # of square biases, over all lengths: 32 MB in float32


class Before(NamedTuple):
    """What one layer's prefix does for a row: it has ``length`` keys, the row's first token is at position ``lead``, and
    the first ``blank`` keys have no bias."""

    length: int = 0
    lead: int = 0
    blank: int = 0

    @classmethod
    def of(cls, prefix: KVPrefix | None) -> Before:
        """As a prefix's own flags say; see :class:`~deltas.patches.KVPrefix`."""
        if prefix is None:
            return cls()
        length = len(prefix.keys)
        if prefix.unbiased:
            return cls(length, length, EVERYTHING)
        if prefix.shifts_keys:
            return cls(length, 0)
        return cls(length, length, 0 if prefix.shifts_positions else length)


class RelativeBias:
    """A stack's table, by distance; every layer of the stack uses it."""

    def __init__(self, attention: Any) -> None:
        """``attention`` is the stack's first ``T5Attention``, which has the weights."""
        self._farthest = int(attention.relative_attention_max_distance)  # all that are farther share a bucket
        weight: Tensor = attention.relative_attention_bias.weight.detach()
        buckets = attention._relative_position_bucket(
            torch.arange(-self._farthest, self._farthest + 1, device=weight.device),
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=self._farthest,
        )
        # [heads, distances], and a last column of zeros for keys without a bias
        self._table = torch.cat([weight[buckets], torch.zeros_like(weight[:1])]).T.contiguous()
        self._squares: dict[int, Tensor] = {}
        self._kept = 0

    def __call__(self, anchors: Tensor, blanks: Tensor | None, keys: int) -> Tensor:
        """``[heads, tokens, keys]`` in the backbone's dtype; ``anchors``, ``blanks`` (None: no key) int64 ``[tokens]``."""
        at = torch.arange(keys, device=anchors.device)
        places = (at - anchors[:, None]).clamp_(-self._farthest, self._farthest) + self._farthest
        if blanks is not None:
            places.masked_fill_(at < blanks[:, None], self._table.shape[1] - 1)
        return self._table[:, places]

    def square(self, length: int) -> Tensor:
        """``[heads, length, length]``, of tokens that attend to each other. Those of common lengths are kept."""
        found = self._squares.get(length)
        if found is None:
            found = self(torch.arange(length, device=self._table.device), None, length)
            if self._kept + found.numel() > KEPT_ELEMENTS:
                self._squares, self._kept = {}, 0
            self._squares[length] = found
            self._kept += found.numel()
        return found

    def behind(self, prefix: KVPrefix, length: int) -> Tensor:
        """``[heads, length, n + length]``, of tokens that also attend to a prefix of n keys before them."""
        before = Before.of(prefix)
        anchors = torch.arange(length, device=self._table.device) + before.lead
        return self(anchors, torch.full_like(anchors, before.blank), before.length + length)


@dataclass(frozen=True, eq=False)
class TokenBias:
    """The biases of packed tokens, each against the keys of its own row's slot."""

    bias: RelativeBias
    anchors: Tensor  # int64 [tokens]
    blanks: Tensor | None

    @classmethod
    def of(
        cls,
        bias: RelativeBias,
        before: Sequence[Before],
        starts: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
    ) -> TokenBias:
        """Of rows whose own tokens ``starts[i] .. starts[i] + counts[i]`` stand behind the prefixes ``before[i]``."""
        rows = list(zip(before, starts, counts, strict=True))
        anchors = [b.lead + t for b, start, count in rows for t in range(start, start + count)]
        blanks = None
        if any(b.blank for b in before):
            blanks = torch.tensor([b.blank for b, _, count in rows for _ in range(count)], device=device)
        return cls(bias, torch.tensor(anchors, device=device), blanks)

    def __call__(self, tokens: slice, keys: int) -> Tensor:
        """See :class:`~server.engine.kv.ScoreBias`."""
        return self.bias(self.anchors[tokens], None if self.blanks is None else self.blanks[tokens], keys)
