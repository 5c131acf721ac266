"""Triton's kernels of single rows against torch and against the C kernels' meaning, in slots and in pages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.ops.triton_kernels import INTERPRETED
from deltas.ops.triton_rows import TritonKernels
from tests.unit.ops.checks import DTYPES, close
from tests.unit.ops.test_native import attention

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KERNELS = TritonKernels()
FACTOR = 4  # the interpreter cuts bfloat16 off instead of rounding it


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 64, 100])
def test_rms_norm(dtype: torch.dtype, n: int) -> None:
    x, weight = tensor(dtype, 3, n + 5)[:, 2 : n + 2], tensor(dtype, n)
    out = torch.empty(3, n, dtype=dtype, device=DEVICE)
    KERNELS.rms_norm(x, weight, 1e-5, out)
    wide = x.double()
    close(out, wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-5) * weight.double(), FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 1024, 1500])
def test_silu_mul_in_place(dtype: torch.dtype, n: int) -> None:
    both = tensor(dtype, 2, 2 * n)
    gate, up = both.chunk(2, dim=-1)
    want = F.silu(gate.double()) * up.double()
    KERNELS.silu_mul(gate, up, gate)
    close(gate, want, FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rotary"), [(1, 8, 8), (9, 16, 16), (3, 20, 12)])
def test_rope(dtype: torch.dtype, heads: int, dim: int, rotary: int) -> None:
    x = tensor(dtype, 4, heads + 2, dim)[:, :heads]
    cos, sin = tensor(dtype, 4, rotary), tensor(dtype, 4, rotary)
    wide, c, s = x.double(), cos.double()[:, None], sin.double()[:, None]
    part = wide[..., :rotary]
    turned = torch.cat([-part[..., rotary // 2 :], part[..., : rotary // 2]], dim=-1)
    want = torch.cat([part * c + turned * s, wide[..., rotary:]], dim=-1)
    KERNELS.rope(x, cos, sin)
    close(x, want, FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(dtype: torch.dtype) -> None:
    k, v = tensor(dtype, 5, 3, 12), tensor(dtype, 5, 4, 12)[:, :3]
    slots, positions = integers([2, 0, 2, 1, 0]), integers([0, 3, 5, 2, 1])
    keys, values = (torch.zeros(3, 3, 6, 12, dtype=dtype, device=DEVICE) for _ in range(2))
    KERNELS.kv_write(k, v, keys, values, slots, positions)
    want = torch.zeros_like(keys)
    want[slots, :, positions] = k
    assert torch.equal(keys, want)
    assert torch.equal(values[slots, :, positions], v)
    pages = torch.tensor([[3, 0], [1, 5], [4, 2]], dtype=torch.int32, device=DEVICE)
    paged, others = (torch.zeros(6, 3, 3, 12, dtype=dtype, device=DEVICE) for _ in range(2))
    KERNELS.write_pages(k, v, paged, others, slots, positions, pages)
    assert torch.equal(paged[pages.long()].transpose(1, 2).reshape(3, 3, 6, 12), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 16), (4, 4, 7), (40, 2, 32)])
@pytest.mark.parametrize("page", [None, 16, 100])
def test_decode_attention(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page: int | None) -> None:
    """In slots and in shuffled pages; what lies behind a row's end does not matter."""
    lengths = integers([1, 0, 65, 300, 1100])
    rows, capacity = len(lengths), 1200
    keys, values = (tensor(dtype, rows + 1, kv_heads, capacity, dim) for _ in range(2))
    slots = integers([3, 0, 5, 1, 2])
    q = tensor(dtype, rows, heads + 1, dim)[:, :heads]
    want = attention(q, keys, values, slots, lengths, dim**-0.5)
    for row in range(rows):
        keys[slots[row], :, lengths[row] :] = float("nan")
        values[slots[row], :, lengths[row] :] = float("nan")
    pages = None
    if page is not None:
        count = capacity // page
        order = torch.randperm((rows + 1) * count).to(DEVICE)
        pages = torch.empty((rows + 1) * count, dtype=torch.int32, device=DEVICE)
        pages[:] = order.int()
        pages = pages.view(rows + 1, count)
        keys, values = (
            _paged(c.view(rows + 1, kv_heads, count, page, dim), order.view(rows + 1, count))
            for c in (keys, values)
        )
    out = torch.full_like(q, 9)
    if pages is None:
        KERNELS.decode_attention(q, keys, values, slots, lengths, dim**-0.5, out)
    else:
        KERNELS.attend_pages(q, keys, values, slots, lengths, dim**-0.5, out, pages)
    close(out, want, FACTOR)


def _paged(slotted: Tensor, order: Tensor) -> Tensor:
    slots, heads, count, page, dim = slotted.shape
    paged = torch.empty(slots * count, heads, page, dim, dtype=slotted.dtype, device=slotted.device)
    paged[order.flatten()] = slotted.transpose(1, 2).reshape(slots * count, heads, page, dim)
    return paged


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_windows_capped_scores_and_biases(softcap: float | None, biased: bool) -> None:
    """As plain attention in float64 over each row's visible keys."""
    firsts, lengths, slots = integers([0, 40, 3]), integers([1, 16, 300]), integers([2, 0, 1])
    keys, values, q = (tensor(torch.float32, *s) for s in ((3, 2, 320, 16), (3, 2, 320, 16), (3, 6, 16)))
    bias = tensor(torch.float32, 3, 6, 300) if biased else None
    out = torch.empty_like(q)
    KERNELS.decode_attention(q, keys, values, slots, lengths, 0.25, out, firsts, softcap, bias)
    for row, (first, n) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
        k, v = (c[slots[row], :, first : first + n].double().repeat_interleave(3, 0) for c in (keys, values))
        scores = torch.einsum("hd,hnd->hn", q[row].double(), k) * 0.25
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias[row, :, :n]
        close(out[row], torch.einsum("hn,hnd->hd", scores.softmax(-1), v), FACTOR)


def test_a_poisoned_row_leaves_its_neighbours() -> None:
    keys, values, q = (tensor(torch.float32, *s) for s in ((2, 1, 80, 16), (2, 1, 80, 16), (2, 2, 16)))
    keys[0, 0, 3] = float("nan")
    out = torch.empty_like(q)
    KERNELS.decode_attention(q, keys, values, integers([0, 1]), integers([70, 80]), 0.25, out)
    assert out[0].isnan().all()
    close(out[1:], attention(q, keys, values, integers([0, 1]), integers([70, 80]), 0.25)[1:], FACTOR)
