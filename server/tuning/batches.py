"""Rows by length, a pass's worth at a time, where no gradients are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

STEP_TOKENS = 4096  # of a pass without gradients

T = TypeVar("T")


def batches(items: Sequence[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """All items, the shortest first; a batch has ``STEP_TOKENS`` tokens at most, or one item."""
    batch: list[T] = []
    tokens = 0
    for item in sorted(items, key=length):
        size = length(item)
        if batch and tokens + size > STEP_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += size
    if batch:
        yield batch
