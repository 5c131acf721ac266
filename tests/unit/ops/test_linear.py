"""The backbone's products: against float64, alone and in batches, with a NaN beside, and where they cannot be had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deltas.hooks import Packed
from deltas.ops import native
from tests.unit.ops.checks import DTYPES, bits, close

SHAPES = [(1, 2), (5, 6), (48, 64), (50, 576), (960, 130), (144, 1536)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def packing(kernels: native.Kernels, weight: Tensor) -> native.Kernels:
    if not kernels.packs(weight):
        pytest.skip("this processor has no wide products of this dtype")
    return kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products(
    kernels: native.Kernels, threads: int, dtype: torch.dtype, out: int, width: int, biased: bool
) -> None:
    weight = torch.randn(out, width).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    x = torch.randn(150, width + 3).to(dtype)[:, :width]  # strided rows
    packed = packing(kernels, weight).pack_linear(weight)
    y = kernels.linear(x, packed, bias, out)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    close(y, wanted)
    for first, count in ((0, 1), (3, 8), (5, 9), (17, 64), (20, 65), (149, 1)):
        alone = kernels.linear(x[first : first + count], packed, bias, out)
        assert torch.equal(bits(alone), bits(y[first : first + count]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row(kernels: native.Kernels, dtype: torch.dtype) -> None:
    weight = torch.randn(100, 64).to(dtype)
    x = torch.randn(33, 64).to(dtype)
    packed = packing(kernels, weight).pack_linear(weight)
    healthy = kernels.linear(x, packed, None, 100)
    x[7, 5], x[8, 6] = float("nan"), float("inf")
    y = kernels.linear(x, packed, None, 100)
    others = [row for row in range(33) if row not in (7, 8)]
    assert torch.equal(bits(y[others]), bits(healthy[others]))
    assert y[7].isnan().all()
    assert not y[8].isfinite().any()


def test_no_tokens(kernels: native.Kernels) -> None:
    weight = torch.randn(7, 4)
    packed = packing(kernels, weight).pack_linear(weight)
    assert kernels.linear(torch.zeros(0, 4), packed, None, 7).shape == (0, 7)


def test_what_does_not_fit_is_refused(kernels: native.Kernels) -> None:
    weight = torch.randn(7, 4)
    packed = packing(kernels, weight).pack_linear(weight)
    with pytest.raises(ValueError, match="fit the input"):
        kernels.linear(torch.zeros(2, 6), packed, None, 7)
    with pytest.raises(ValueError, match="fit the input"):
        kernels.linear(torch.zeros(2, 4, dtype=torch.bfloat16), packed, None, 7)
    with pytest.raises(ValueError, match="bias"):
        kernels.linear(torch.zeros(2, 4), packed, torch.zeros(6), 7)
    odd = torch.randn(7, 3)
    assert not kernels.packs(odd)
    with pytest.raises(ValueError, match="cannot be packed"):
        kernels.pack_linear(odd)


@pytest.mark.parametrize("width", [6, 5])  # 5: an odd width is oneDNN's
def test_linears_side_by_side(kernels: native.Kernels, width: int) -> None:
    linears = [nn.Linear(width, 4), nn.Linear(width, 3, bias=False)]
    x = torch.randn(2, 9, width)
    packed = Packed.of(linears, prepack=True, kernels=kernels)
    torch.testing.assert_close(packed(x), torch.cat([linear(x) for linear in linears], -1))
    across = x.transpose(0, 2).contiguous().transpose(0, 2)  # whose rows are not contiguous
    torch.testing.assert_close(packed(across), packed(x))
