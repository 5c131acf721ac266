"""Sparse changes as they are packed: sorted, each place once, with indices of 32 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.patches import SparseDiff


@dataclass(frozen=True, slots=True, eq=False)
class SparseRows:
    """A :class:`~deltas.patches.SparseDiff` by rows: output i adds ``values[k] * x[columns[k]]``, k from ``starts[i]``
    to ``starts[i + 1]``.

    ``starts`` int32 ``[out + 1]``, ``columns`` int32 ``[count]``, ascending in every row, ``values`` ``[count]``.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor


def tidy(patch: SparseDiff, rows: int, columns: int) -> SparseDiff:
    """The same change to a weight ``[rows, columns]``, in row order, repeated places added up; int32 indices.

    Raises :class:`InvalidDelta` for a place outside the weight: what applies it does not look again.
    """
    for name, indices, size in (("row", patch.rows, rows), ("column", patch.columns, columns)):
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= size):
            raise InvalidDelta(f"{patch.site}: a {name} is outside 0 .. {size - 1}", field=patch.site)
    places, order = (patch.rows.long() * columns + patch.columns).sort(stable=True)
    values = patch.values[order]
    distinct, which = torch.unique_consecutive(places, return_inverse=True)
    if len(distinct) < len(places):
        values = values.new_zeros(len(distinct)).index_add_(0, which, values)
    row = torch.div(distinct, columns, rounding_mode="floor")
    return replace(patch, rows=row.int(), columns=(distinct - row * columns).int(), values=values)


def by_rows(patch: SparseDiff, rows: int) -> SparseRows:
    """A tidy change, by rows."""
    starts = torch.searchsorted(patch.rows, torch.arange(rows + 1, dtype=torch.int32), out_int32=True)
    return SparseRows(starts, patch.columns, patch.values)


def packed(patch: SparseDiff, rows: int, columns: int, *, embedding: bool) -> SparseDiff | SparseRows:
    """The form in which a change to a weight ``[rows, columns]`` is applied fastest for its bytes.

    By rows, unless most rows have nothing: their starts would weigh more than the entries. An embedding is looked up
    by its few tokens, so it needs no starts.
    """
    sorted_ = tidy(patch, rows, columns)
    if embedding or 2 * len(sorted_.values) < rows:
        return sorted_
    return by_rows(sorted_, rows)
