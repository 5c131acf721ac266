"""Bidirectional attention by window: a token sees those that are near it on either side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Queries that are computed together; they read the keys of their block and of a window on either side of it."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention of ``q``, ``k``, ``v`` ``[rows, heads, tokens, head_dim]`` -> as ``q``.

    With a ``window`` token i sees token j where ``|i - j| < window``, which is how Hugging Face's ModernBERT hands its
    windows to an attention function; without one all see all, and the keys may be more than the queries. ``bias``
    ``[1, heads, tokens, keys]`` is added to the scores; no backbone has it beside windows.
    """
    tokens = q.shape[2]
    if window is None or tokens <= window:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if bias is not None:
        raise ValueError("a bias goes with no window")
    blocks = []
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        near = slice(max(0, start - window + 1), min(tokens, stop + window - 1))
        at = torch.arange(tokens, device=q.device)
        mask = (at[start:stop, None] - at[near]).abs() < window
        found = F.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, near], v[:, :, near], attn_mask=mask, scale=scale
        )
        blocks.append(found)
    return torch.cat(blocks, dim=2)
