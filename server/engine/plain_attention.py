"""Attention in plain torch operations, of a row's chunk and of one token a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    count: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """Causal attention of ``count`` tokens of one row that follow ``start`` cached ones, to the keys that they see."""
    end = start + count
    first = end - keys.shape[1]
    masked = start > 0 or softcap is not None or bias is not None or (window is not None and window < end)
    mask = None
    if masked:
        mask = torch.ones(count, end - first, dtype=torch.bool, device=q.device).tril(start - first)
        if window is not None:
            mask = mask.triu(start - first + 1 - window)
    if softcap is not None and mask is not None:
        return _softened(q, keys, values, mask, scale, softcap)
    if bias is not None and mask is not None:
        mask = bias.masked_fill(~mask, float("-inf")).to(q.dtype)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask if mask is None or mask.dim() == 2 else mask[None],
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return attended[0].transpose(0, 1)


def _softened(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention whose scores are capped, which torch's own attention cannot do."""
    tokens, heads, width = q.shape
    grouped = q.transpose(0, 1).reshape(keys.shape[0], -1, tokens, width)
    scores = torch.matmul(grouped, keys[:, None].transpose(2, 3)).float() * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    attended = torch.matmul(scores.softmax(-1).to(q.dtype), values[:, None])
    return attended.reshape(heads, tokens, width).transpose(0, 1)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    firsts: Tensor | None,
    lengths: Tensor,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One token a row against its slot, in plain torch: gathered to the longest row and masked.

    ``bias`` ``[heads, rows, keys]`` is added to the scores.
    """
    rows, heads, width = q.shape
    kv_heads = keys.shape[1]
    ends = lengths if firsts is None else firsts + lengths
    longest = int(ends.max())
    k = keys[slots, :, :longest]
    v = values[slots, :, :longest]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, width)
    scores = torch.matmul(grouped, k.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores += bias[:, :, :longest].transpose(0, 1).reshape(rows, kv_heads, -1, longest)
    at = torch.arange(longest, device=q.device)
    hidden = at >= ends[:, None]
    if firsts is not None:
        hidden |= at < firsts[:, None]
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1).to(q.dtype)
    # a released slot may hold anything beyond the row's end; 0 * NaN would let it through
    v = v.masked_fill(hidden[:, None, :, None], 0)
    return torch.matmul(weights, v).reshape(rows, heads, width)
