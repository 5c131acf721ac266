"""The patch kernel against float64 references: ranks, segments, strides, order, NaN, neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deltas.ops import native
from deltas.ops.inputs import activate
from deltas.patches import Activation
from tests.unit.ops.checks import DTYPES, bits, close


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


class Patches:
    """A table under construction, with what keeps its tensors alive and what float64 says of its effect."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.lines: list[list[int]] = []
        self.patches: list[tuple[slice, slice, dict[str, Tensor | None], Activation, int]] = []

    def add(
        self, row0: int, rows: int, width: int, out0: int, out: int, rank: int, *, bias: bool = False,
        gain: bool = False, shift: bool = False, activation: Activation = Activation.IDENTITY, reads: int = 0,
    ) -> None:  # fmt: skip
        def tensor(*shape: int) -> Tensor:
            return (torch.randn(*shape) / max(1, shape[-1]) ** 0.5).to(self.dtype)

        parts = {
            "down": tensor(rank, width) if rank else None,
            "bias": tensor(rank) if bias else None,
            "up": tensor(rank, out) if rank else None,
            "gain": tensor(out) if gain else None,
            "shift": tensor(out) if shift else None,
        }
        address = [0 if t is None else t.data_ptr() for t in parts.values()]
        self.lines.append([row0, rows, rank, *address, out0, out, int(activation), reads])
        self.patches.append((slice(row0, row0 + rows), slice(out0, out0 + out), parts, activation, reads))

    @property
    def table(self) -> np.ndarray:
        return np.array(self.lines, dtype=np.int64).reshape(-1, len(native.ENTRY_FIELDS))

    def expected(self, x: Tensor, y: Tensor) -> Tensor:
        y = y.double()
        for rows, columns, parts, activation, reads in self.patches:
            part = y[rows, columns]
            added = torch.zeros_like(part)
            if parts["down"] is not None and parts["up"] is not None:
                z = x[rows].double() if reads in (0, 3) else part if reads == 1 else part + x[rows].double()
                h = z @ parts["down"].double().T
                if parts["bias"] is not None:
                    h = h + parts["bias"].double()
                added += activate(h, activation) @ parts["up"].double()
            if parts["gain"] is not None:
                part = part * parts["gain"].double()
            if parts["shift"] is not None:
                added += parts["shift"].double()
            y[rows, columns] = part + added
        return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 64, 577])
def test_patch_of_many_ranks_and_segments(
    kernels: native.Kernels, threads: int, dtype: torch.dtype, width: int
) -> None:
    patches = Patches(dtype)
    outs, row = [7, 64, 131], 0
    for rank, rows in [(1, 1), (3, 2), (8, 1), (17, 5), (64, 37), (0, 3), (8, 4), (5, 0)]:
        out0 = 0
        for out in outs:
            patches.add(
                row, rows, width, out0, out, rank, gain=rank in (0, 5, 8), shift=rank % 2 == 0, bias=rank == 3
            )
            out0 += out
        row += rows + 1  # and one row of the base between
    x, y = torch.randn(row, width).to(dtype), torch.randn(row, sum(outs)).to(dtype)
    want, before = patches.expected(x, y), y.clone()
    kernels.patch(patches.table, x, y)
    close(y, want, 1 if dtype == torch.bfloat16 else 4)
    untouched = torch.ones(row, dtype=torch.bool)
    for rows_, _, _, _, _ in patches.patches:
        untouched[rows_] = False
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
def test_patch_as_bottleneck(kernels: native.Kernels, dtype: torch.dtype, activation: Activation) -> None:
    patches = Patches(dtype)
    for i, reads in enumerate((1, 2, 3, 2)):
        patches.add(
            i * 5, 5 if i else 1, 100, 0, 100, 12, bias=True, shift=True, activation=activation, reads=reads
        )
    x, y = torch.randn(20, 100).to(dtype), torch.randn(20, 100).to(dtype)
    want = patches.expected(x, y)
    kernels.patch(patches.table, x, y)
    close(y, want, 1 if dtype == torch.bfloat16 else 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_with_strides(kernels: native.Kernels, dtype: torch.dtype) -> None:
    patches = Patches(dtype)
    patches.add(1, 9, 33, 3, 40, 6)
    x, wide = torch.randn(10, 50).to(dtype)[:, 5:38], torch.randn(10, 90).to(dtype)
    before, y = wide.clone(), wide[:, 7:57]
    want = patches.expected(x, y)
    kernels.patch(patches.table, x, y)
    close(y, want)
    assert torch.equal(bits(wide[:, :10]), bits(before[:, :10]))
    assert torch.equal(bits(wide[:, 50:]), bits(before[:, 50:]))


def test_patches_of_the_same_columns_apply_in_order(kernels: native.Kernels, threads: int) -> None:
    patches = Patches(torch.float32)
    for row in range(0, 60, 20):
        patches.add(row, 20, 48, 0, 48, 4)
        patches.add(row, 20, 48, 0, 48, 0, shift=True)
        patches.add(row, 20, 48, 0, 48, 9, activation=Activation.TANH, reads=1)
    x, y = torch.randn(60, 48), torch.randn(60, 48)
    want = patches.expected(x, y)
    kernels.patch(patches.table, x, y)
    close(y, want, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_a_batch(
    kernels: native.Kernels, threads: int, dtype: torch.dtype
) -> None:
    patches = Patches(dtype)
    for row in range(0, 40, 5):
        patches.add(row, 5, 96, 0, 70, 11, activation=Activation.SILU)
    x, y = torch.randn(40, 96).to(dtype), torch.randn(40, 70).to(dtype)
    together = y.clone()
    kernels.patch(patches.table, x, together)
    for row in range(40):
        table = patches.table[row // 5 : row // 5 + 1].copy()
        table[0, :2] = row, 1
        alone = y.clone()
        kernels.patch(table, x, alone)
        assert torch.equal(bits(alone[row]), bits(together[row]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_patch_keeps_poison_in_its_row(kernels: native.Kernels, dtype: torch.dtype, bad: float) -> None:
    patches = Patches(dtype)
    patches.add(0, 9, 80, 0, 50, 8)
    patches.add(9, 1, 80, 0, 50, 8)
    x, y = torch.randn(10, 80).to(dtype), torch.randn(10, 50).to(dtype)
    clean, poisoned = y.clone(), y.clone()
    kernels.patch(patches.table, x, clean)
    x[3, 77] = bad
    kernels.patch(patches.table, x, poisoned)
    assert not poisoned[3].isfinite().any()
    keep = torch.arange(10) != 3
    assert torch.equal(bits(poisoned[keep]), bits(clean[keep]))


def test_patch_refuses_what_leaves_its_tensors(kernels: native.Kernels) -> None:
    x, y = torch.zeros(4, 8), torch.zeros(4, 8)
    kernels.patch(Patches(torch.float32).table, x, y)  # an empty table is no error
    for row0, rows, out0, out, reads in [(0, 5, 0, 8, 0), (-1, 2, 0, 8, 0), (0, 1, 4, 8, 0), (0, 1, 0, 4, 1)]:
        patches = Patches(torch.float32)
        patches.add(row0, rows, 8, out0, out, 2, reads=reads)
        with pytest.raises(IndexError):
            kernels.patch(patches.table, x, y)
    assert not y.any()
    with pytest.raises(ValueError, match="table"):
        kernels.patch(np.zeros((2, 22), dtype=np.int64)[:, ::2], x, y)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.patch(Patches(torch.float32).table, x.T, torch.zeros(8, 4))
