"""Decode attention in Triton: one query a row over keys and values in slots, or in pages that a table names.

The keys of a row are read in parts by programs of their own, as many as the cache's capacity asks for and not the
batch, and the parts' sums are put together by a second launch: a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltas.ops.triton_kernels import dot_type

KEYS = 64  # keys of one step
PART = 512  # keys that make a part worth a program of its own
MOST_PARTS = 8
GROUP = 16  # query heads of one product, at least: the smallest tile on tensor cores


@triton.jit
def _attend(
    q, q_row, q_head, keys, values, c_page, c_head, c_token,
    slots, firsts, lengths, pages, pages_slot, page,
    bias, bias_row, bias_head, scale, softcap,
    sums, tops, weights, group, dim,
    PAGED: tl.constexpr, FIRSTS: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length, slot = tl.load(lengths + row), tl.load(slots + row)
    first = tl.load(firsts + row) if FIRSTS else 0
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    head = kv_head * group + g
    query = tl.load(
        q + row * q_row + head[:, None] * q_head + d[None, :],
        mask=(g < group)[:, None] & (d < dim)[None, :],
        other=0.0,
    )
    each = tl.cdiv(length, PARTS * KEYS) * KEYS
    top = tl.full([GROUP], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([GROUP], dtype=tl.float32)
    total = tl.zeros([GROUP, DIM], dtype=tl.float32)
    for start in range(part * each, tl.minimum(length, (part + 1) * each), KEYS):
        n = start + tl.arange(0, KEYS)
        position = first + n
        if PAGED:
            held = tl.load(pages + slot * pages_slot + position // page, mask=n < length, other=0)
            at = held.to(tl.int64) * c_page + (position % page) * c_token
        else:
            at = slot * c_page + position * c_token
        seen = (n < length)[:, None] & (d < dim)[None, :]
        where = at[:, None] + kv_head * c_head + d[None, :]
        k = tl.load(keys + where, mask=seen, other=0.0)
        score = tl.dot(query.to(DOT), tl.trans(k).to(DOT), input_precision="ieee") * scale
        if CAPPED:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        if BIAS:
            score += tl.load(
                bias + row * bias_row + head[:, None] * bias_head + n[None, :],
                mask=(g < group)[:, None] & (n < length)[None, :],
                other=0.0,
            )
        score = tl.where((n < length)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        shrunk = tl.exp(top - higher)
        p = tl.exp(score - higher[:, None])
        v = tl.load(values + where, mask=seen, other=0.0)
        total = total * shrunk[:, None] + tl.dot(p.to(DOT), v.to(DOT), input_precision="ieee")
        weight = weight * shrunk + tl.sum(p, axis=1)
        top = higher
    at = (row * tl.num_programs(1) * group + head) * PARTS + part
    tl.store(sums + at[:, None] * dim + d[None, :], total, mask=(g < group)[:, None] & (d < dim)[None, :])
    tl.store(tops + at, top, mask=g < group)
    tl.store(weights + at, weight, mask=g < group)


@triton.jit
def _join(
    sums, tops, weights, out, out_row, out_head, dim,
    PARTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, d = tl.arange(0, PARTS), tl.arange(0, DIM)
    at = (row * tl.num_programs(1) + head) * PARTS + part
    weight = tl.load(weights + at)
    top = tl.load(tops + at)
    highest = tl.max(tl.where(weight != 0, top, -1e38), axis=0)  # not -inf, whose differences are no numbers
    share = tl.where(weight != 0, tl.exp(tl.where(weight != 0, top, highest) - highest), 0.0)
    total = tl.load(sums + at[:, None] * dim + d[None, :], mask=(d < dim)[None, :], other=0.0)
    whole = tl.sum(weight * share, axis=0)
    joined = tl.sum(total * share[:, None], axis=0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out + row * out_row + head * out_head + d, joined.to(out.dtype.element_ty), mask=d < dim)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    *,
    firsts: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    pages: Tensor | None = None,
) -> None:
    """Exact softmax attention with grouped query heads, of any length; 0 visible keys give zeros.

    ``q``, ``out`` ``[rows, heads, head_dim]``; ``keys``, ``values`` ``[slots, kv_heads, tokens, head_dim]``, any
    strides but the same for both, or, with ``pages`` int32 ``[slots, most pages]``, ``[pages, kv_heads, tokens of a page,
    head_dim]``. ``slots``, ``lengths``, ``firsts`` int64 ``[rows]``; ``bias`` float32 ``[rows, heads, keys]``: see
    :meth:`deltas.ops.native.Kernels.decode_attention`. Raises ValueError where shapes or strides do not fit.
    """
    rows, heads, dim = q.shape
    kv_heads = keys.shape[1]
    if (
        keys.shape != values.shape or keys.stride() != values.stride() or heads % kv_heads or keys.shape[3] != dim
        or not (q.stride(2) == out.stride(2) == keys.stride(3) == 1) or out.shape != q.shape
    ):  # fmt: skip
        raise ValueError("decode: shapes or strides do not fit together")
    if not rows:
        return
    capacity = keys.shape[2] * (1 if pages is None else pages.shape[1])
    parts = min(MOST_PARTS, triton.next_power_of_2(max(1, capacity // PART)))
    shape, group = (rows, heads, parts), heads // kv_heads
    sums = torch.empty((*shape, dim), dtype=torch.float32, device=q.device)
    tops, weights = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    wide = max(16, triton.next_power_of_2(dim))
    _attend[(rows, kv_heads, parts)](
        q, q.stride(0), q.stride(1), keys, values, keys.stride(0), keys.stride(1), keys.stride(2),
        slots, slots if firsts is None else firsts, lengths,
        slots if pages is None else pages, 0 if pages is None else pages.stride(0), keys.shape[2],
        sums if bias is None else bias, *((0, 0) if bias is None else bias.stride()[:2]), scale, softcap or 1.0,
        sums, tops, weights, group, dim,
        PAGED=pages is not None, FIRSTS=firsts is not None, BIAS=bias is not None, CAPPED=softcap is not None,
        DOT=dot_type(q.dtype), PARTS=parts, GROUP=max(GROUP, triton.next_power_of_2(group)), DIM=wide, KEYS=KEYS,
    )  # fmt: skip
    _join[(rows, heads)](sums, tops, weights, out, out.stride(0), out.stride(1), dim, PARTS=parts, DIM=wide)
