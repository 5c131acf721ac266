"""Triton kernels of the patches: a table of units walked on the device, factors read where they lie.

A *unit* is one line of the table of :mod:`deltas.ops.table`, of at most ``TILE`` tokens. Two launches serve all
units of a group, whatever their deltas, ranks and kinds:

1. ``_shrink``: ``down z`` of every unit, in :func:`splits` parts of the input, float32, into scratch memory. The parts
   are added in a fixed order by the second launch, so a row's result does not depend on the rows beside it.
2. ``_expand``: bias and activation, then ``y = gain y + up^T h + shift`` in float32, rounded once.

A unit computes with its own rank, to the next ``TILE``, and reads no more of the factors than it has. Programs beyond
its rank, and lines whose tokens are 0, end at once, so a launch of fixed size (a captured graph's) serves any table that
fits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltas.ops.native import ENTRY_FIELDS
from deltas.ops.table import TILE

TOKENS = RANKS = TILE
OUT = 64  # columns of y that one program writes
WIDTH = 128  # columns of z that one step of a product reads
SPLIT = 1024  # columns of z that one program of the first launch reads, where there are enough
MOST_SPLITS = 8

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether ``TRITON_INTERPRET=1`` was set when this was imported: kernels then run as Python, on CPU tensors."""

_FIELDS = tl.constexpr(len(ENTRY_FIELDS))
_ROWS, _RANK = tl.constexpr(1), tl.constexpr(2)
_DOWN, _DOWN_BIAS, _UP, _GAIN, _SHIFT = (tl.constexpr(i) for i in range(3, 8))
_OUT0, _OUT, _ACTIVATION, _READS = (tl.constexpr(i) for i in range(8, 12))


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _activate(h, kind):
    """The numbers are those of :class:`deltas.patches.Activation`. NaN stays NaN."""
    if kind == 1:
        h = tl.where(h < 0, 0.0, h)
    elif kind == 2:
        h = h * tl.sigmoid(h)
    elif kind == 3:
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif kind == 4:
        h = 0.5 * h * (1.0 + _tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))
    elif kind == 5:
        h = _tanh(h)
    elif kind == 6:
        h = tl.sigmoid(h)
    elif kind == 7:
        h = tl.where(h < 0, 0.01 * h, h)
    return h


@triton.jit
def _shrink(
    table, x, ldx, width, y, ldy, scratch, ranks,
    SPLITS: tl.constexpr, DOT: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    unit, split = tl.program_id(0), tl.program_id(2)
    line = table + unit * _FIELDS
    rows, rank = tl.load(line + _ROWS), tl.load(line + _RANK)
    rank0 = tl.program_id(1) * RANKS
    if (rows > 0) & (rank0 < rank):
        row0, out0, reads = tl.load(line), tl.load(line + _OUT0), tl.load(line + _READS)
        down = tl.load(line + _DOWN).to(tl.pointer_type(y.dtype.element_ty))
        down = tl.multiple_of(down, 16)
        t, r, i = tl.arange(0, TOKENS), rank0 + tl.arange(0, RANKS), tl.arange(0, WIDTH)
        from_x, from_y = reads != 1, (reads == 1) | (reads == 2)
        x_rows = x + (row0 + t)[:, None] * ldx
        y_rows = y + (row0 + t)[:, None] * ldy + out0
        each = tl.cdiv(width, SPLITS * WIDTH) * WIDTH
        h = tl.zeros([TOKENS, RANKS], dtype=tl.float32)
        for first in range(split * each, tl.minimum(width, (split + 1) * each), WIDTH):
            at = first + i
            seen = (t < rows)[:, None] & (at < width)[None, :]
            z = tl.load(x_rows + at[None, :], mask=seen & from_x, other=0.0).to(tl.float32)
            z += tl.load(y_rows + at[None, :], mask=seen & from_y, other=0.0).to(tl.float32)
            factor = tl.load(
                down + r[None, :] * width + at[:, None],
                mask=(r < rank)[None, :] & (at < width)[:, None],
                other=0.0,
            )
            h = tl.dot(z.to(DOT), factor.to(DOT), h, input_precision="ieee")
        to = scratch + ((unit * SPLITS + split) * TOKENS + t)[:, None] * ranks + r[None, :]
        tl.store(to, h)


@triton.jit
def _expand(
    table, y, ldy, scratch, ranks,
    SPLITS: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    line = table + unit * _FIELDS
    rows, out = tl.load(line + _ROWS), tl.load(line + _OUT)
    first = tl.program_id(1) * OUT
    if (rows > 0) & (first < out):
        row0, rank, out0 = tl.load(line), tl.load(line + _RANK), tl.load(line + _OUT0)
        if ALIGNED:
            out, out0 = tl.multiple_of(out, 16), tl.multiple_of(out0, 16)
        kind, bias_at = tl.load(line + _ACTIVATION), tl.load(line + _DOWN_BIAS)
        gain_at, shift_at = tl.load(line + _GAIN), tl.load(line + _SHIFT)
        pointer = tl.pointer_type(y.dtype.element_ty)
        up = tl.multiple_of(tl.load(line + _UP).to(pointer), 16)
        t, o = tl.arange(0, TOKENS), first + tl.arange(0, OUT)
        added = tl.zeros([TOKENS, OUT], dtype=tl.float32)
        for rank0 in range(0, rank, RANKS):
            r = rank0 + tl.arange(0, RANKS)
            h = tl.zeros([TOKENS, RANKS], dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                h += tl.load(scratch + ((unit * SPLITS + split) * TOKENS + t)[:, None] * ranks + r[None, :])
            if bias_at != 0:
                bias = tl.load(bias_at.to(pointer) + r, mask=r < rank, other=0.0)
                h += bias.to(tl.float32)[None, :]
            h = tl.where((t < rows)[:, None] & (r < rank)[None, :], _activate(h, kind), 0.0)
            factor = tl.load(
                up + r[:, None] * out + o[None, :], mask=(r < rank)[:, None] & (o < out)[None, :], other=0.0
            )
            added = tl.dot(h.to(DOT), factor.to(DOT), added, input_precision="ieee")
        to = y + (row0 + t)[:, None] * ldy + out0 + o[None, :]
        seen = (t < rows)[:, None] & (o < out)[None, :]
        value = tl.load(to, mask=seen, other=0.0).to(tl.float32)
        if gain_at != 0:
            gain = tl.load(tl.multiple_of(gain_at.to(pointer), 16) + o, mask=o < out, other=0.0)
            value *= gain.to(tl.float32)[None, :]
        value += added
        if shift_at != 0:
            shift = tl.load(tl.multiple_of(shift_at.to(pointer), 16) + o, mask=o < out, other=0.0)
            value += shift.to(tl.float32)[None, :]
        tl.store(to, value.to(y.dtype.element_ty), mask=seen)


def splits(width: int) -> int:
    """In how many parts an input is reduced: by its width alone, so that results do not depend on the batch."""
    return min(MOST_SPLITS, max(1, width // SPLIT))


def dot_type(dtype: torch.dtype) -> Any:
    """What products take: the stored dtype, but float32 in the interpreter, which multiplies bfloat16 wrongly."""
    found = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    return tl.float32 if INTERPRETED else found


def patch(units: Tensor, x: Tensor, y: Tensor, *, rank: int, out: int, aligned: bool) -> None:
    """Applies units to ``y`` ``[tokens, columns]`` in place; no two of them may have a (token, column) in common.

    ``units`` int64 ``[n, len(ENTRY_FIELDS)]`` on the device; lines without tokens do nothing. ``x`` ``[tokens, in]``
    (the residual, at a block site) and the memory that the table's addresses name have y's dtype; factors, gains and
    shifts lie at multiples of 16 bytes. No unit's rank is above ``rank`` nor its columns above ``out``; ``aligned``
    says that every unit's first column and number of columns are multiples of 16. What a table says is not checked.
    """
    if x.dtype != y.dtype or x.shape[0] != y.shape[0] or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("x and y must have one dtype, the same tokens and contiguous columns")
    count, width = units.shape[0], x.shape[1]
    if not count:
        return
    parts, tiles, dot = splits(width), -(-rank // RANKS), dot_type(y.dtype)
    scratch = torch.empty((count, parts, TOKENS, tiles * RANKS), dtype=torch.float32, device=y.device)
    if tiles:
        _shrink[(count, tiles, parts)](
            units, x, x.stride(0), width, y, y.stride(0), scratch, tiles * RANKS,
            SPLITS=parts, DOT=dot, TOKENS=TOKENS, RANKS=RANKS, WIDTH=WIDTH,
        )  # fmt: skip
    _expand[(count, -(-out // OUT))](
        units, y, y.stride(0), scratch, tiles * RANKS,
        SPLITS=parts, DOT=dot, ALIGNED=aligned, TOKENS=TOKENS, RANKS=RANKS, OUT=OUT,
    )  # fmt: skip
