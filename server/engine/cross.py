"""Cross-attention over kept keys and values: every token of a row sees all that its encoder gave, and no mask is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.ops.rows import RowKernels
from server.engine.kv import SlotKV, singles_and_chunks
from server.engine.plain_attention import decode


class CrossAttention:
    """One pass of packed rows of ``counts`` tokens; row i's keys are the first ``lengths[layer][i]`` of ``slots[i]``."""

    def __init__(
        self,
        kv: SlotKV,
        kernels: RowKernels | None,
        slots: Sequence[int],
        counts: Sequence[int],
        lengths: Sequence[Sequence[int]],
    ) -> None:
        self._kv = kv
        self._kernels = kernels
        self._slots = slots
        self._counts = counts
        self._lengths = lengths
        self._singles, self._chunks = singles_and_chunks(counts)
        self._token_slots = self._by_token(slots)
        self._known: dict[tuple[int, ...], Tensor] = {}  # layers rarely differ

    def __call__(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]`` -> the same shape, contiguous."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        by_row = self._lengths[layer]
        lengths = self._of_tokens(tuple(by_row))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for first, count in self._singles:
            part = slice(first, first + count)
            slots = self._token_slots[part]
            if self._kernels is not None:
                self._kernels.decode_attention(q[part], keys, values, slots, lengths[part], scale, out[part])
            else:
                out[part] = decode(q[part], keys, values, slots, None, lengths[part], scale)
        for row, first in self._chunks:
            part = slice(first, first + self._counts[row])
            k, v = (cache[self._slots[row], :, : by_row[row]][None] for cache in (keys, values))
            queries, grouped = q[part].transpose(0, 1)[None], q.shape[1] != keys.shape[1]
            found = F.scaled_dot_product_attention(queries, k, v, scale=scale, enable_gqa=grouped)
            out[part] = found[0].transpose(0, 1)
        return out

    def _of_tokens(self, lengths: tuple[int, ...]) -> Tensor:
        if lengths not in self._known:
            self._known[lengths] = self._by_token(lengths)
        return self._known[lengths]

    def _by_token(self, values: Sequence[int]) -> Tensor:
        """A number a row as one a token, int64."""
        found = [value for value, count in zip(values, self._counts, strict=True) for _ in range(count)]
        return torch.tensor(found, dtype=torch.int64, device=self._kv.data.device)
