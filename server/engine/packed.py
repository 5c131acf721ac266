"""What runners of packed rows have in common: one plan for rows one after another, and prompts put before them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Any, Protocol

import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from deltas.ops import Ops


class Attend(Protocol):
    """A pass's self-attention. ``where`` is a layer's number or its module; ``q``, ``k``, ``v`` ``[tokens, heads,
    head_dim]`` -> as ``q``."""

    def __call__(self, where: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, /) -> Tensor: ...


class AttendBothWays(Attend, Protocol):
    """An encoder's; ``entered`` is what the layer's attention was given."""

    entered: Tensor | None


class Cross(Protocol):
    """A pass's cross-attention at a layer: ``q`` ``[tokens, heads, head_dim]`` -> the same shape."""

    def __call__(self, layer: int, q: Tensor, scale: float, /) -> Tensor: ...


See = Callable[[Plan | None], Plan | None]
"""Given every plan before it is applied; what it returns is applied."""


def as_it_is(plan: Plan | None) -> Plan | None:
    """Sees nothing and changes nothing."""
    return plan


def plan_rows(ops: Ops, deltas: Rows[PackedDelta | None], lengths: Rows[int]) -> Plan | None:
    """The plan of packed rows: row i has ``lengths[i]`` tokens and uses ``deltas[i]``."""
    segments, at = [], 0
    for delta, length in zip(deltas, lengths, strict=True):
        segments.append(Segment(at, length, delta))
        at += length
    return ops.plan(segments, at)


def with_prompts(embedded: Tensor, lengths: Rows[int], prompts: Rows[Tensor | None]) -> Tensor:
    """Packed embeddings of rows of so many tokens, each behind its prompt."""
    if all(prompt is None for prompt in prompts):
        return embedded
    parts: list[Tensor] = []
    for prompt, part in zip(prompts, torch.split(embedded, list(lengths)), strict=True):
        parts += [part] if prompt is None else [prompt, part]
    return torch.cat(parts)
