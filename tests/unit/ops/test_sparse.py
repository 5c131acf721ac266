"""Sparse changes: packing, the C kernel and its substitute in torch against dense float64 products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.ops import native, sparse
from deltas.patches import SparseDiff
from deltas.sparse import SparseRows, packed

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def draw(
    rows: int, columns: int, count: int, dtype: torch.dtype = torch.float32
) -> tuple[SparseDiff, Tensor]:
    """A change of ``count`` entries, some at one place, and the dense float64 matrix that it is."""
    row, column = torch.randint(rows, (count,)), torch.randint(columns, (count,))
    values = torch.randn(count).to(dtype)
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    matrix.index_put_((row, column), values.double(), accumulate=True)
    return SparseDiff("here", row, column, values), matrix


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def test_packing_sorts_and_adds_up() -> None:
    patch = SparseDiff(
        "here", torch.tensor([2, 0, 2, 2]), torch.tensor([3, 1, 0, 3]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    )
    by_rows = packed(patch, 3, 4, embedding=False)
    assert isinstance(by_rows, SparseRows)
    assert (by_rows.starts.tolist(), by_rows.columns.tolist()) == ([0, 1, 1, 3], [1, 0, 3])
    assert by_rows.values.tolist() == [2.0, 4.0, 9.0]
    few = packed(patch, 3, 4, embedding=True)
    assert isinstance(few, SparseDiff)
    assert (few.rows.tolist(), few.columns.tolist()) == ([0, 2, 2], [1, 0, 3])
    assert few.rows.dtype == few.columns.dtype == by_rows.starts.dtype == torch.int32
    assert isinstance(packed(patch, 7, 4, embedding=False), SparseDiff)  # 3 entries in 7 rows: no starts


@pytest.mark.parametrize(("row", "column"), [(3, 0), (-1, 0), (0, 4), (0, -1), (1 << 33, 0)])
def test_places_outside_never_reach_a_kernel(row: int, column: int) -> None:
    patch = SparseDiff("here", torch.tensor([0, row]), torch.tensor([0, column]), torch.ones(2))
    with pytest.raises(InvalidDelta, match="outside") as error:
        packed(patch, 3, 4, embedding=False)
    assert error.value.field == "here"


@pytest.mark.parametrize("native_kernel", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "count"), [(1, 1, 1), (7, 5, 20), (70, 33, 300), (65, 600, 9000), (40, 9, 6)]
)
def test_sparse_products(
    kernels: native.Kernels,
    threads: int,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    count: int,
    native_kernel: bool,
) -> None:
    patch, matrix = draw(rows, columns, count, dtype)
    for tokens in (1, 2, 15, 16, 37):
        x = torch.randn(tokens, columns + 3).to(dtype)[:, 2:-1]
        wide = torch.randn(tokens, rows + 9).to(dtype)
        before, y = wide.clone(), wide[:, 4 : 4 + rows]
        want = y.double() + x.double() @ matrix.T
        change = packed(patch, rows, columns, embedding=False)
        sparse.add(change, x, y, kernels if native_kernel else None)
        scale = max(1.0, want.abs().max().item())
        assert (y.double() - want).abs().max().item() <= (1e-6 if dtype == torch.float32 else 0.02) * scale
        assert torch.equal(bits(wide[:, :4]), bits(before[:, :4]))
        assert torch.equal(bits(wide[:, 4 + rows :]), bits(before[:, 4 + rows :]))
        assert isinstance(change, SparseRows) == (count != 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_a_batch(
    kernels: native.Kernels, threads: int, dtype: torch.dtype
) -> None:
    change = packed(draw(131, 90, 3000, dtype)[0], 131, 90, embedding=False)
    assert isinstance(change, SparseRows)
    x, y = torch.randn(50, 90).to(dtype), torch.randn(50, 131).to(dtype)
    together = y.clone()
    sparse.add(change, x, together, kernels)
    for row in range(50):
        alone = y[row : row + 1].clone()
        sparse.add(change, x[row : row + 1], alone, kernels)
        assert torch.equal(bits(alone[0]), bits(together[row]))


@pytest.mark.parametrize("native_kernel", [True, False])
def test_poison_stays_in_its_row(kernels: native.Kernels, native_kernel: bool) -> None:
    change = packed(draw(40, 30, 1200)[0], 40, 30, embedding=False)
    x, y = torch.randn(20, 30), torch.randn(20, 40)
    used = kernels if native_kernel else None
    clean, poisoned = y.clone(), y.clone()
    sparse.add(change, x, clean, used)
    x[3, 7] = float("nan")
    sparse.add(change, x, poisoned, used)
    assert poisoned[3].isnan().any()
    keep = torch.arange(20) != 3
    assert torch.equal(bits(poisoned[keep]), bits(clean[keep]))


@pytest.mark.parametrize("count", [1, 8, 900])
def test_a_sparse_change_of_an_embedding(count: int) -> None:
    patch, matrix = draw(30, 12, count)
    ids = torch.tensor([0, 29, 3, 3, 17, int(patch.rows[0])])
    y = torch.randn(6, 20)[:, 5:17]
    want = y + matrix[ids].float()
    sparse.add(packed(patch, 30, 12, embedding=True), ids, y, None)
    torch.testing.assert_close(y, want)


def test_the_kernel_refuses_what_does_not_fit(kernels: native.Kernels) -> None:
    change = packed(draw(8, 6, 40)[0], 8, 6, embedding=False)
    assert isinstance(change, SparseRows)
    starts, columns, values = change.starts, change.columns, change.values
    x, y = torch.zeros(2, 6), torch.zeros(2, 8)
    for wrong in [
        (starts[:-1], columns, values, x, y),
        (starts.long(), columns, values, x, y),
        (starts, columns[:-1], values, x, y),
        (starts, columns, values.bfloat16(), x, y),
        (starts, columns, values, x[:1], y),
        (starts, columns, values, x.T.contiguous().T, y),
    ]:
        with pytest.raises(ValueError, match=r"sparse: shapes|contiguous"):
            kernels.sparse(*wrong)
    assert not y.any()
