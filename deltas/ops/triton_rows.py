"""Triton kernels of single rows, called as the C ones are (:class:`deltas.ops.native.Kernels`), on CUDA tensors.

They compute in float32 and round where Hugging Face's modules round.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from deltas.ops import triton_attention

BLOCK = 1024  # elements of a program of silu_mul


@triton.jit
def _rms_norm(x, ldx, weight, eps, n, out, ldo, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    value = tl.load(x + row * ldx + i, mask=i < n, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / n + eps)
    normal = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    scaled = normal * tl.load(weight + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + row * ldo + i, scaled.to(out.dtype.element_ty), mask=i < n)


@triton.jit
def _silu_mul(gate, ldg, up, ldu, n, out, ldo, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gate + row * ldg + i, mask=i < n, other=0.0).to(tl.float32)
    opened = (value * tl.sigmoid(value)).to(out.dtype.element_ty).to(tl.float32)
    product = opened * tl.load(up + row * ldu + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + row * ldo + i, product.to(out.dtype.element_ty), mask=i < n)


@triton.jit
def _rope(
    x, x_token, x_head, heads, cos, sin, ldc, half,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    element = x.dtype.element_ty
    inside = (h < heads)[:, None] & (i < half)[None, :]
    at = x + token * x_token + h[:, None] * x_head + i[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    turned = cos + token * ldc + i
    c0 = tl.load(turned, mask=i < half, other=0.0).to(tl.float32)[None, :]
    c1 = tl.load(turned + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    turned = sin + token * ldc + i
    s0 = tl.load(turned, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(turned + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    a = (first * c0).to(element).to(tl.float32) + (-second * s0).to(element).to(tl.float32)
    b = (second * c1).to(element).to(tl.float32) + (first * s1).to(element).to(tl.float32)
    tl.store(at, a.to(element), mask=inside)
    tl.store(at + half, b.to(element), mask=inside)


@triton.jit
def _kv_write(
    k, k_token, k_head, v, v_token, v_head, keys, values,
    c_page, c_head, c_token, slots, positions, pages, pages_slot, page,
    kv_heads, dim, PAGED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at, position = tl.load(slots + token), tl.load(positions + token)
    if PAGED:
        at = tl.load(pages + at * pages_slot + position // page).to(tl.int64)
        position = position % page
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (h < kv_heads) & (d < dim)
    to = at * c_page + h * c_head + position * c_token + d
    tl.store(keys + to, tl.load(k + token * k_token + h * k_head + d, mask=inside), mask=inside)
    tl.store(values + to, tl.load(v + token * v_token + h * v_head + d, mask=inside), mask=inside)


class TritonKernels:
    """See :class:`deltas.ops.rows.RowKernels` and :class:`deltas.ops.rows.PagedKernels`.

    What indices and tables say is not checked: they are on the device.
    """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """``weight * (x / rms(x))``, rounded between the two; ``[rows, n]``."""
        rows, n = x.shape
        if rows:
            _rms_norm[(rows,)](
                x, x.stride(0), weight, eps, n, out, out.stride(0), N=triton.next_power_of_2(n)
            )

    def silu_mul(self, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """``silu(gate) * up``, silu rounded first; ``[rows, n]``. ``out`` may be ``gate`` or ``up``."""
        rows, n = gate.shape
        if rows:
            _silu_mul[(rows, triton.cdiv(n, BLOCK))](
                gate, gate.stride(0), up, up.stride(0), n, out, out.stride(0), BLOCK=BLOCK
            )

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotates ``x`` ``[tokens, heads, head_dim]`` in place; ``cos``, ``sin`` ``[tokens, rotary]``."""
        tokens, heads, _ = x.shape
        half = cos.shape[1] // 2
        if tokens:
            _rope[(tokens, triton.cdiv(heads, 8))](
                x, x.stride(0), x.stride(1), heads, cos, sin, cos.stride(0), half,
                HEADS=8, HALF=triton.next_power_of_2(half),
            )  # fmt: skip

    def kv_write(
        self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
    ) -> None:
        """Copies ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` to ``positions`` of ``slots``, int64 ``[tokens]``."""
        _write(k, v, keys, values, slots, positions, None)

    def write_pages(
        self,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        positions: Tensor,
        pages: Tensor,
    ) -> None:
        """The same, into pages."""
        _write(k, v, keys, values, slots, positions, pages)

    def decode_attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        firsts: Tensor | None = None,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """One query a row over its slot; see :func:`deltas.ops.triton_attention.decode`."""
        triton_attention.decode(
            q, keys, values, slots, lengths, scale, out, firsts=firsts, softcap=softcap, bias=bias
        )

    def attend_pages(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        pages: Tensor,
        firsts: Tensor | None = None,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """The same, over pages."""
        triton_attention.decode(
            q,
            keys,
            values,
            slots,
            lengths,
            scale,
            out,
            firsts=firsts,
            softcap=softcap,
            bias=bias,
            pages=pages,
        )


def _write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, pages: Tensor | None
) -> None:
    tokens, kv_heads, dim = k.shape
    if tokens:
        _kv_write[(tokens,)](
            k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), keys, values,
            keys.stride(0), keys.stride(1), keys.stride(2), slots, positions,
            slots if pages is None else pages, 0 if pages is None else pages.stride(0), keys.shape[2],
            kv_heads, dim, PAGED=pages is not None,
            HEADS=triton.next_power_of_2(kv_heads), DIM=triton.next_power_of_2(dim),
        )  # fmt: skip
