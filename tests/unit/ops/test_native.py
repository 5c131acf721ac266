"""The C kernels against float64 references: odd sizes, strides, NaN, neighbours, threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.ops import native
from deltas.ops.reference import activate
from deltas.patches import Activation

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of the largest value


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def close(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    error = (got.double() - want.double()).abs().max().item()
    assert error <= factor * TOLERANCE[got.dtype] * max(1.0, want.abs().max().item())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


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
def test_attention_from_a_first_key_on_and_with_capped_scores(
    kernels: native.Kernels, threads: int, dtype: torch.dtype, softcap: float | None
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
    kernels.decode_attention(q, keys, values, slots, lengths, 1.0, out, firsts, softcap)
    want = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(8):
        seen = slice(firsts[row], firsts[row] + lengths[row])
        if lengths[row]:
            k, v = (part[slots[row], :, seen].double().repeat_interleave(3, 0) for part in (keys, values))
            scores = torch.einsum("hd,hnd->hn", q[row].double(), k)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
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
