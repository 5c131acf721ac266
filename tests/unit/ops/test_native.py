"""The C kernels against float64 references: odd sizes, strides, NaN, neighbours, threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.ops import native
from tests.unit.ops.checks import DTYPES, bits, close


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, (slot, n) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if n:
            share = q.shape[1] // keys.shape[1]
            k, v = (c[slot, :, :n].double().repeat_interleave(share, 0) for c in (keys, values))
            p = torch.softmax(torch.einsum("hd,hnd->hn", q[row].double(), k) * scale, -1)
            out[row] = torch.einsum("hn,hnd->hd", p, v)
    return out


def cache(dtype: torch.dtype, *shape: int, token_major: bool = False) -> Tensor:
    slots, heads, tokens, dim = shape
    if token_major:
        return torch.randn(slots, tokens, heads, dim).to(dtype).transpose(1, 2)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (10, 1, 80), (5, 1, 7), (8, 2, 128), (2, 1, 256)]
)
def test_decode_attention(
    kernels: native.Kernels, threads: int, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    lengths = torch.tensor([1, 2, 0, 15, 16, 17, 255, 256, 257, 700])
    keys = cache(dtype, 12, kv_heads, 700, dim, token_major=dim == 80)
    values = cache(dtype, 12, kv_heads, 700, dim, token_major=dim == 80)
    slots = torch.randperm(12)[:10]
    for row in range(10):  # what lies behind a row's length must not matter
        keys[slots[row], :, lengths[row] :] = float("nan")
        values[slots[row], :, lengths[row] :] = float("nan")
    q = torch.randn(10, heads + 1, dim).to(dtype)[:, :heads]
    out = torch.empty(10, 2 * heads, dim, dtype=dtype)[:, heads:]
    kernels.decode_attention(q, keys, values, slots, lengths, dim**-0.5, out)
    close(out, attention(q, keys, values, slots, lengths, dim**-0.5))
    for row in range(10):
        alone = torch.empty_like(out[row : row + 1])
        at = slice(row, row + 1)
        kernels.decode_attention(q[at], keys, values, slots[at], lengths[at], dim**-0.5, alone)
        assert torch.equal(bits(alone), bits(out[at]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_from_a_first_key_on_and_with_capped_and_biased_scores(
    kernels: native.Kernels, threads: int, dtype: torch.dtype, softcap: float | None, biased: bool
) -> None:
    firsts = torch.tensor([0, 1, 0, 40, 3, 255, 256, 0])
    lengths = torch.tensor([1, 1, 0, 16, 300, 257, 444, 700])
    keys, values = cache(dtype, 9, 2, 700, 32), cache(dtype, 9, 2, 700, 32)
    slots = torch.randperm(9)[:8]
    for row in range(8):  # what lies before and behind must not matter
        seen = slice(firsts[row], firsts[row] + lengths[row])
        for part in (keys, values):
            inside = part[slots[row], :, seen].clone()
            part[slots[row]] = float("nan")
            part[slots[row], :, seen] = inside
    q, out = torch.randn(8, 6, 32).to(dtype), torch.empty(8, 6, 32, dtype=dtype)
    bias = torch.randn(6, 8, 701).transpose(0, 1) * 3 if biased else None
    kernels.decode_attention(q, keys, values, slots, lengths, 1.0, out, firsts, softcap, bias)
    want = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(8):
        seen = slice(firsts[row], firsts[row] + lengths[row])
        if lengths[row]:
            k, v = (part[slots[row], :, seen].double().repeat_interleave(3, 0) for part in (keys, values))
            scores = torch.einsum("hd,hnd->hn", q[row].double(), k)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores if bias is None else scores + bias[row, :, : lengths[row]]
            want[row] = torch.einsum("hn,hnd->hd", scores.softmax(-1), v)
    close(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_a_prompt_are_rows_of_one_slot(
    kernels: native.Kernels, threads: int, dtype: torch.dtype
) -> None:
    keys, values = cache(dtype, 3, 2, 290, 32), cache(dtype, 3, 2, 290, 32)
    q, out = torch.randn(290, 6, 32).to(dtype), torch.empty(290, 6, 32, dtype=dtype)
    slots, lengths = torch.full((290,), 1), torch.arange(1, 291)
    kernels.decode_attention(q, keys, values, slots, lengths, 0.2, out)
    whole = (x[None].double() for x in (q.transpose(0, 1), keys[1], values[1]))
    want = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True, scale=0.2)
    close(out, want[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_extreme_scores(kernels: native.Kernels, dtype: torch.dtype) -> None:
    keys, values = cache(dtype, 1, 1, 600, 64), cache(dtype, 1, 1, 600, 64)
    q, out = torch.randn(1, 2, 64).to(dtype) * 40, torch.empty(1, 2, 64, dtype=dtype)
    slots, lengths = torch.zeros(1, dtype=torch.int64), torch.tensor([600])
    kernels.decode_attention(q, keys, values, slots, lengths, 1.0, out)
    close(out, attention(q, keys, values, slots, lengths, 1.0), 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "keys", "values"])
def test_attention_keeps_poison_in_its_row(kernels: native.Kernels, dtype: torch.dtype, where: str) -> None:
    tensors = {"q": torch.randn(4, 3, 64).to(dtype)}
    tensors |= {"keys": cache(dtype, 4, 1, 300, 64), "values": cache(dtype, 4, 1, 300, 64)}
    slots, lengths = torch.arange(4), torch.tensor([290, 5, 300, 40])
    clean, poisoned = (torch.empty(4, 3, 64, dtype=dtype) for _ in range(2))
    kernels.decode_attention(*tensors.values(), slots, lengths, 0.1, clean)
    tensors[where][2] = float("nan")
    kernels.decode_attention(*tensors.values(), slots, lengths, 0.1, poisoned)
    assert poisoned[2].isnan().all()
    assert torch.equal(bits(poisoned[[0, 1, 3]]), bits(clean[[0, 1, 3]]))


def test_attention_and_kv_write_refuse_bad_indices(kernels: native.Kernels) -> None:
    keys, values = cache(torch.float32, 2, 1, 8, 16), cache(torch.float32, 2, 1, 8, 16)
    q, one = torch.randn(1, 1, 16), torch.tensor([1])
    for slot, length in [(2, 1), (-1, 1), (0, 9)]:
        with pytest.raises(IndexError):
            kernels.decode_attention(
                q, keys, values, torch.tensor([slot]), torch.tensor([length]), 1.0, torch.empty_like(q)
            )
    for first, length in [(-1, 1), (9, 0), (8, 1), (2, 7)]:
        with pytest.raises(IndexError):
            kernels.decode_attention(
                *(q, keys, values, torch.tensor([0]), torch.tensor([length]), 1.0, torch.empty_like(q)),
                torch.tensor([first]),
            )
    for slot, position in [(2, 0), (-1, 0), (0, 8), (0, -1)]:
        with pytest.raises(IndexError):
            kernels.kv_write(q, q, keys, values, torch.tensor([slot]), torch.tensor([position]))
    with pytest.raises(ValueError, match="int64"):
        kernels.decode_attention(q, keys, values, one.int(), one, 1.0, torch.empty_like(q))
    with pytest.raises(ValueError, match="fit"):
        kernels.decode_attention(q, keys, values[:, :, :4], one, one, 1.0, torch.empty_like(q))
    for bias in (torch.zeros(1, 1, 4), torch.zeros(1, 2, 5), torch.zeros(1, 1, 5).double()):
        with pytest.raises(ValueError, match="bias"):
            kernels.decode_attention(
                *(q, keys, values, one, torch.tensor([5]), 1.0, torch.empty_like(q)), bias=bias
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(kernels: native.Kernels, dtype: torch.dtype) -> None:
    fused = torch.randn(40, 5, 24).to(dtype)
    k, v = fused[:, 1:3], fused[:, 3:]
    keys, values = cache(dtype, 6, 2, 30, 24), cache(dtype, 6, 2, 30, 24)
    at = torch.randperm(6 * 30)[:40]
    slots, positions = at // 30, at % 30
    want_k, want_v = keys.clone(), values.clone()
    want_k[slots, :, positions], want_v[slots, :, positions] = k, v
    kernels.kv_write(k, v, keys, values, slots, positions)
    assert torch.equal(keys, want_k)
    assert torch.equal(values, want_v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 64, 577])
def test_rms_norm(kernels: native.Kernels, threads: int, dtype: torch.dtype, n: int) -> None:
    x, weight = (torch.randn(50, n + 3) * 3).to(dtype)[:, 3:], torch.randn(n).to(dtype)
    out = torch.empty(50, n, dtype=dtype)
    x[7, n // 2] = float("nan")
    kernels.rms_norm(x, weight, 1e-5, out)
    y = x.float()
    want = weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    assert out[7].isnan().all()
    keep = torch.arange(50) != 7
    close(out[keep], want[keep], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (10, 10), (128, 128)])
def test_rope(kernels: native.Kernels, threads: int, dtype: torch.dtype, dim: int, rotary: int) -> None:
    x = torch.randn(60, 7, dim).to(dtype)[:, 1:6]
    angles = torch.rand(60, rotary // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    turned, kept = x[..., :rotary].clone(), x[..., rotary:].clone()
    half = torch.cat([-turned[..., rotary // 2 :], turned[..., : rotary // 2]], -1)
    want = turned * cos[:, None] + half * sin[:, None]
    kernels.rope(x, cos, sin)
    assert torch.equal(x[..., rotary:], kept)
    if dtype == torch.bfloat16:
        assert torch.equal(x[..., :rotary], want)  # rounded where torch rounds
    close(x[..., :rotary], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 64, 1543])
def test_silu_mul(kernels: native.Kernels, threads: int, dtype: torch.dtype, n: int) -> None:
    fused = (torch.randn(20, 2 * n) * 20).to(dtype)
    gate, up = fused[:, :n], fused[:, n:]
    gate[0, 0], gate[1, 0], gate[2, 0] = float("nan"), 200.0, -200.0
    want = F.silu(gate) * up
    out = torch.empty(20, n, dtype=dtype)
    kernels.silu_mul(gate, up, out)
    assert out[0, 0].isnan()
    out[0, 0] = want[0, 0] = 0
    close(out, want, 4)


def test_bfloat16_rounds_as_torch_does(kernels: native.Kernels) -> None:
    """By adding a shift in float32: every rounding case, and numbers that round to infinity.

    Without the numbers below the normal range, which the hardware's conversion takes for zero.
    """
    a = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    a = torch.where(a.abs() < 2.0**-100, 0.0, a)
    y = a[torch.randperm(1 << 16)].view(64, 1024).clone()
    shift = a[torch.randperm(1 << 16)[:1024]].clone()
    line = [0, 64, 0, 0, 0, 0, 0, shift.data_ptr(), 0, 1024, 0, 0]
    want = (y.float() + shift.float()).to(torch.bfloat16)
    kernels.patch(np.array([line], dtype=np.int64), torch.zeros(64, 1).to(torch.bfloat16), y)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


def test_one_openmp_runtime_and_torch_sets_the_threads(kernels: native.Kernels, threads: int) -> None:
    assert kernels.threads() == threads
    maps = Path("/proc/self/maps")
    if maps.exists():
        files = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
        assert len({f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp"))}) == 1
