"""Attention by window, block by block, against one mask over the whole row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.window import BLOCK, attend


def drawn(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, rows, 2, tokens, 8, generator=generator)
    return q, k, v


@pytest.mark.parametrize("window", [1, 5, 65, BLOCK + 1])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 66, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_equals_one_mask(tokens: int, window: int) -> None:
    q, k, v = drawn(2, tokens)
    at = torch.arange(tokens)
    near = (at[:, None] - at).abs() < window
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=0.3)
    torch.testing.assert_close(attend(q, k, v, 0.3, window), wanted)


def test_without_a_window_keys_may_be_more_than_queries() -> None:
    q, k, v = drawn(1, 2 * BLOCK)
    wanted = F.scaled_dot_product_attention(q[:, :, :3], k, v, scale=0.3)
    torch.testing.assert_close(attend(q[:, :, :3], k, v, 0.3, None), wanted)


@pytest.mark.parametrize("window", [2, 40])
def test_what_a_token_sees(window: int) -> None:
    """A token that changes is seen ``window - 1`` tokens away on either side, and no further."""
    tokens, changed = 2 * BLOCK, BLOCK + 3
    q, k, v = drawn(1, tokens)
    before = attend(q, k, v, 0.3, window)
    k[:, :, changed], v[:, :, changed] = 1.0, 2.0
    moved = (attend(q, k, v, 0.3, window) != before).any(-1).any(1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(changed - window + 1, changed + window))
