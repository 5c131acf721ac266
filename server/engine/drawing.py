"""Draws tokens from distributions: the filters and the inverse of the cumulative distribution.

All filters keep the most likely tokens, equal ones in order of their ids, so what they keep is a beginning
of the sorted vocabulary. Sorting all of it is slow; a few hundred of the best nearly always hold all that is
kept, and more are looked at only where they do not. No step mixes rows or depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CANDIDATES = (64, 512, 4096)  # how many of the best tokens to look at, before all of them
BLOCK = 256  # tokens per partial sum of an unfiltered distribution


def best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each line and their ids, each ``[rows, count]``; equals by ascending id."""
    if count >= values.shape[-1]:
        ordered = values.sort(dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    ids = values.topk(count, dim=-1).indices.sort(dim=-1).values
    ordered = values.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered.values, ids.gather(-1, ordered.indices)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token id for each line of ``probs`` ``[rows, vocab]``, by its number in [0, 1) (float64)."""
    padding = -probs.shape[-1] % BLOCK
    blocks = (F.pad(probs, (0, padding)) if padding else probs).reshape(len(probs), -1, BLOCK)
    ends = blocks.sum(dim=-1).double().cumsum(dim=-1)
    target = _below(uniforms[:, None] * ends[:, -1:], ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True)
    before = F.pad(ends, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(dim=-1)
    target = _below(target - before, inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, target, right=True))[:, 0]


def draw_filtered(
    probs: Tensor,
    uniforms: Tensor,
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
) -> Tensor:
    """As :func:`draw`, from what ``min_p``, ``top_k`` (0: all) and then ``top_p`` keep, each given per line.

    ``min_p`` keeps what is at least that share of the largest probability; ``top_p`` keeps the fewest tokens
    that hold that share of what the other two left.
    """
    vocab = probs.shape[-1]
    k = torch.tensor([value or vocab for value in top_k], device=probs.device)[:, None]
    p = probs.new_tensor(top_p, dtype=torch.float64)[:, None]
    floor = probs.new_tensor(min_p)[:, None]
    tokens = torch.empty(len(top_k), dtype=torch.long, device=probs.device)
    left = torch.arange(len(top_k), device=probs.device)
    for size in (*CANDIDATES, vocab):
        size = min(size, vocab)
        values, ids = best(probs[left], size)
        mass = values.double().cumsum(dim=-1)
        kept, known = _kept(values, mass, k[left], p[left], floor[left], vocab)
        total = mass.gather(-1, kept - 1)
        at = torch.searchsorted(mass, _below(uniforms[left, None] * total, total), right=True)
        drawn = ids.gather(-1, at.clamp(max=size - 1))[:, 0]
        tokens[left[known]] = drawn[known]
        left = left[~known]
        if size == vocab or not len(left):
            break
    return tokens


def _kept(
    values: Tensor, mass: Tensor, k: Tensor, p: Tensor, floor: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """How many of the sorted ``values`` the filters keep, ``[rows, 1]``, and for which rows that is certain.

    It is not certain where the candidates end before the filters do, or where the cut falls among values
    equal to the last candidate: its equals further on might come first by id.
    """
    size = values.shape[-1]
    limited = torch.minimum((values >= floor * values[:, :1]).sum(dim=-1, keepdim=True), k)
    free = (k >= vocab) & (floor <= 0)
    total = torch.where(free, 1.0, mass.gather(-1, limited.clamp(max=size) - 1))
    kept = torch.minimum((mass < p * total).sum(dim=-1, keepdim=True) + 1, limited)
    if size == vocab:
        return kept, torch.ones_like(kept[:, 0], dtype=torch.bool)
    inside = (free | (limited < size)) & (kept < size)
    kept = kept.clamp(max=size)
    return kept, (inside & (values.gather(-1, kept - 1) > values[:, -1:]))[:, 0]


def _below(target: Tensor, end: Tensor) -> Tensor:
    """``target``, kept under ``end``: rounding must not push a draw past the last possible token."""
    return torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
