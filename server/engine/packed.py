"""What runners of packed rows have in common: one plan for rows one after another, and prompts put before them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from deltas.ops import Ops

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
