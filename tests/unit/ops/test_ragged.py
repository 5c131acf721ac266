"""Attention of packed rows in C against float64: odd sizes, prefixes, windows, strides, NaN, neighbours, threads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from deltas.ops import native
from tests.unit.ops.checks import DTYPES, bits, close

LENGTHS = (1, 3, 16, 0, 33, 8, 130)
PREFIXES = (0, 5, 0, 0, 17, 1, 20)
Prefix = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


def packed(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as parts of one product of all tokens, as a fused linear gives them."""
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    whole = torch.randn(sum(LENGTHS), sum(widths)).to(dtype)
    q, k, v = whole.split(widths, dim=1)
    return q.unflatten(1, (heads, dim)), k.unflatten(1, (kv_heads, dim)), v.unflatten(1, (kv_heads, dim))


def drawn(counts: tuple[int, ...], kv_heads: int, dim: int, dtype: torch.dtype) -> list[Prefix]:
    return [
        (torch.randn(n, kv_heads, dim).to(dtype), torch.randn(n, kv_heads, dim).to(dtype)) for n in counts
    ]


def table_of(
    lengths: tuple[int, ...], prefixes: list[Prefix] | None = None, first: int = 0
) -> npt.NDArray[np.int64]:
    lines, at = [], first
    for row, length in enumerate(lengths):
        keys, values = prefixes[row] if prefixes else (torch.empty(0), torch.empty(0))
        lines.append((at, length, keys.data_ptr(), values.data_ptr(), len(keys)))
        at += length
    return np.array(lines, dtype=np.int64)


def wanted(
    q: Tensor, k: Tensor, v: Tensor, prefixes: list[Prefix], scale: float, window: int | None = None
) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    share = q.shape[1] // k.shape[1]
    at = 0
    for length, (keys, values) in zip(LENGTHS, prefixes, strict=True):
        rows = slice(at, at + length)
        seen = [torch.cat([a.double(), b[rows].double()]).repeat_interleave(share, 1)
                for a, b in ((keys, k), (values, v))]  # fmt: skip
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), seen[0]) * scale
        if window is not None:
            near = torch.arange(length)
            hidden = (near[:, None] - near).abs() >= window
            scores[:, :, len(keys) :].masked_fill_(hidden, -torch.inf)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), seen[1])
        at += length
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 32), (4, 2, 64), (2, 1, 7), (1, 1, 80)])
def test_rows_with_prefixes(
    kernels: native.Kernels,
    threads: int,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
) -> None:
    q, k, v = packed(heads, kv_heads, dim, dtype)
    for counts in (PREFIXES, (0,) * len(LENGTHS)):
        prefixes = drawn(counts, kv_heads, dim, dtype)
        out = torch.empty(q.shape, dtype=dtype)
        kernels.ragged_attention(table_of(LENGTHS, prefixes), q, k, v, dim**-0.5, out, window)
        close(out, wanted(q, k, v, prefixes, dim**-0.5, window), factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_same_to_the_bit(
    kernels: native.Kernels, threads: int, dtype: torch.dtype
) -> None:
    q, k, v = packed(4, 2, 32, dtype)
    prefixes = drawn(PREFIXES, 2, 32, dtype)
    out, alone = torch.zeros(q.shape, dtype=dtype), torch.zeros(q.shape, dtype=dtype)
    kernels.ragged_attention(table_of(LENGTHS, prefixes), q, k, v, 0.2, out)
    at = 0
    for row, length in enumerate(LENGTHS):
        table = table_of((length,), [prefixes[row]], first=at)
        kernels.ragged_attention(table, q, k, v, 0.2, alone)
        at += length
    assert torch.equal(bits(out), bits(alone))


def test_a_poisoned_row_keeps_to_itself(kernels: native.Kernels, threads: int) -> None:
    q, k, v = packed(2, 2, 32, torch.float32)
    clean, out = torch.zeros(q.shape), torch.zeros(q.shape)
    kernels.ragged_attention(table_of(LENGTHS), q, k, v, 0.2, clean)
    at = sum(LENGTHS[:4])
    k[at + 5, 1] = torch.nan
    v[at + 9, 0] = torch.inf
    kernels.ragged_attention(table_of(LENGTHS), q, k, v, 0.2, out)
    rows = torch.arange(len(q))
    inside = (rows >= at) & (rows < at + LENGTHS[4])
    assert torch.isnan(out[inside][:, 1]).all()
    assert not torch.isfinite(out[inside][:, 0]).all()
    assert torch.equal(bits(out[~inside]), bits(clean[~inside]))


def test_scores_of_any_size(kernels: native.Kernels) -> None:
    """The largest score is taken off first: nothing overflows, and what is far below it counts for nothing."""
    q, k, v = packed(1, 1, 32, torch.float32)
    q *= 1000
    out = torch.empty(q.shape)
    none = drawn((0,) * len(LENGTHS), 1, 32, torch.float32)
    kernels.ragged_attention(table_of(LENGTHS), q, k, v, 1.0, out)
    assert (out.double() - wanted(q, k, v, none, 1.0)).abs().max() < 1e-2


def test_tokens_of_no_row_are_left_alone(kernels: native.Kernels) -> None:
    q, k, v = packed(2, 2, 32, torch.float32)
    out = torch.full(q.shape, 7.0)
    kernels.ragged_attention(table_of((4,), first=3), q, k, v, 0.2, out)
    assert (out[:3] == 7).all()
    assert (out[7:] == 7).all()
    assert (out[3:7] != 7).all()
    kernels.ragged_attention(np.zeros((0, len(native.ROW_FIELDS)), dtype=np.int64), q, k, v, 0.2, out)


@pytest.mark.parametrize("line", [(-1, 2, 0, 0, 0), (0, 192, 0, 0, 0), (0, -1, 0, 0, 0), (0, 2, 0, 0, 3)])
def test_rows_outside_the_tensors(kernels: native.Kernels, line: tuple[int, ...]) -> None:
    q, k, v = packed(2, 2, 32, torch.float32)
    with pytest.raises(IndexError):
        kernels.ragged_attention(np.array([line], dtype=np.int64), q, k, v, 0.2, torch.empty(q.shape))


def test_what_does_not_fit_together(kernels: native.Kernels) -> None:
    q, k, v = packed(4, 2, 32, torch.float32)
    out, table = torch.empty(q.shape), table_of(LENGTHS)
    for changed in (
        (table, q, k[:, :, :16], v, out, None),
        (table, q, k.bfloat16(), v, out, None),
        (table, q[:, :3], k, v, out[:, :3], None),
        (table, q, k, v, out.transpose(1, 2).contiguous().transpose(1, 2), None),
        (table, q, k, v, out, 0),
        (table.astype(np.int32), q, k, v, out, None),
        (table[:, :3], q, k, v, out, None),
    ):
        lines, *tensors, given, window = changed
        with pytest.raises(ValueError, match=r"ragged_attention|table"):
            kernels.ragged_attention(lines, *tensors, 0.2, given, window)
