"""Where a canonical tensor comes from: a tensor of the file as it is, a part of one in another shape, or the config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.frozen import Frozen
from deltas.formats.header import Header, TensorInfo, shown

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Derived:
    """A part of a file's tensor: first rows, then columns, then transposed, then laid out as ``shape``, then spread.

    ``rows`` and ``columns`` are (start, stop) along the first and the last dimension. ``shape`` may have one -1. One tensor
    may be the source of several; that all of it is used is the reader's business. ``blocks``: the rows in so many equal
    parts are the blocks of a block-diagonal matrix.
    """

    source: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False
    shape: Shape | None = None
    blocks: int = 1

    def shape_of(self, whole: Shape) -> Shape:
        """The shape that :meth:`of` gives for a tensor of shape ``whole``. Raises :class:`InvalidDelta`."""
        sizes = list(whole)
        for bounds, dimension in ((self.rows, 0), (self.columns, -1)):
            if bounds is None:
                continue
            if not sizes or not 0 <= bounds[0] < bounds[1] <= sizes[dimension]:
                raise self._misfit(whole, f"there is no part {list(bounds)} of it")
            sizes[dimension] = bounds[1] - bounds[0]
        if self.transposed:
            if len(sizes) != 2:
                raise self._misfit(whole, "expected two dimensions")
            sizes.reverse()
        if self.blocks > 1:
            if len(sizes) != 2 or sizes[0] % self.blocks or self.shape is not None:
                raise self._misfit(whole, f"it cannot be {self.blocks} blocks")
            return sizes[0], sizes[1] * self.blocks
        if self.shape is None:
            return tuple(sizes)
        count, known = math.prod(sizes), math.prod(size for size in self.shape if size != -1)
        if known == 0 or (count % known if -1 in self.shape else count != known):
            raise self._misfit(whole, f"it cannot be laid out as {list(self.shape)}")
        return tuple(count // known if size == -1 else size for size in self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The part, contiguous, in memory of its own."""
        part = whole if self.rows is None else whole[self.rows[0] : self.rows[1]]
        part = part if self.columns is None else part[..., self.columns[0] : self.columns[1]]
        part = part.T if self.transposed else part
        part = part if self.shape is None else part.reshape(self.shape)
        if self.blocks > 1:
            spread = part.new_zeros(self.blocks, len(part) // self.blocks, self.blocks, part.shape[1])
            for index, block in enumerate(part.chunk(self.blocks)):
                spread[index, :, index] = block
            part = spread.reshape(len(part), -1)
        return part.clone(memory_format=torch.contiguous_format)

    def _misfit(self, whole: Shape, problem: str) -> InvalidDelta:
        return InvalidDelta(f"{shown(self.source)} has shape {list(whole)}: {problem}", field=self.source)


@dataclass(frozen=True, slots=True)
class Given:
    """Integers that the config holds: an int64 tensor ``[n]``."""

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Zeros:
    """A float32 tensor of zeros."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class Own:
    """The backbone's own tensor of that state-dict key, in float32, where a file does without it: BERT's pooler."""

    key: str
    shape: Shape


Source = str | Derived | Given | Zeros | Own
"""A name in the file means the whole tensor; it can be used so once."""


def name_of(source: Source) -> str | None:
    """The tensor of the file that a source needs."""
    if isinstance(source, str):
        return source
    return source.source if isinstance(source, Derived) else None


def info_of(source: Source, header: Header) -> TensorInfo:
    """Dtype and shape of the canonical tensor. Raises :class:`InvalidDelta` where the file's does not fit."""
    if isinstance(source, Given):
        return TensorInfo(torch.int64, (len(source.values),))
    if isinstance(source, Zeros | Own):
        return TensorInfo(torch.float32, source.shape)
    info = header.tensors[source if isinstance(source, str) else source.source]
    return info if isinstance(source, str) else TensorInfo(info.dtype, source.shape_of(info.shape))


def tensor_of(source: Source, loaded: Mapping[str, Tensor], frozen: Frozen | None = None) -> Tensor:
    """The canonical tensor, from the file's and the backbone's. Raises :class:`UnsupportedDelta` where that has none."""
    if isinstance(source, Own):
        names = (source.key, source.key.partition(".")[2])  # with the base model's prefix, and without
        owns = [] if frozen is None else [tensor for name in names if (tensor := frozen(name)) is not None]
        own = owns[0] if owns else None
        if own is None or tuple(own.shape) != source.shape:
            raise UnsupportedDelta(
                f"neither the delta nor the backbone holds {source.key}; save it with the delta",
                field=source.key,
            )
        return own.to(torch.float32)
    if isinstance(source, Given):
        return torch.tensor(source.values, dtype=torch.int64)
    if isinstance(source, Zeros):
        return torch.zeros(source.shape)
    return loaded[source] if isinstance(source, str) else source.of(loaded[source.source])
