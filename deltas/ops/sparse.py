"""Sparse changes to the tokens of one segment: by the C kernel where there is one, else by torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.ops.native import Kernels
from deltas.patches import SparseDiff
from deltas.sparse import SparseRows


def add(change: SparseDiff | SparseRows, x: Tensor, y: Tensor, kernels: Kernels | None) -> None:
    """Adds ``S x`` to ``y`` ``[tokens, out]``; ``x`` ``[tokens, in]``, or token ids ``[tokens]`` at an embedding."""
    if isinstance(change, SparseRows):
        if kernels is not None:
            kernels.sparse(change.starts, change.columns, change.values, x, y)
        else:
            y += _bags(change, x)
    elif x.is_floating_point():
        y.index_add_(1, change.rows, x[:, change.columns.long()] * change.values)
    else:
        _add_rows(change, x, y)


def _bags(change: SparseRows, x: Tensor) -> Tensor:
    """A row of S names the inputs to sum and their weights, which is what an embedding bag does."""
    summed = F.embedding_bag(
        change.columns,
        x.T.contiguous(),
        change.starts,
        mode="sum",
        per_sample_weights=change.values,
        include_last_offset=True,
    )
    return summed.T


def _add_rows(change: SparseDiff, ids: Tensor, y: Tensor) -> None:
    """Adds to each token's embedding the entries of its row. Rows are in order, so each is one stretch of entries."""
    wanted = ids.to(torch.int32)
    first = torch.searchsorted(change.rows, wanted)
    counts = torch.searchsorted(change.rows, wanted, right=True) - first
    tokens = torch.repeat_interleave(counts)
    entries = torch.arange(len(tokens), device=ids.device) - (counts.cumsum(0) - counts - first)[tokens]
    y.index_put_((tokens, change.columns[entries].long()), change.values[entries], accumulate=True)
