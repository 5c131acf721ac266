"""The deltas' plans of one composition of rows: kept as long as the same rows take the same number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from deltas.groups import SiteGroup
from deltas.ops import Ops

HEAD = "head"


@dataclass(frozen=True)
class Composition:
    """What the layers apply, and what the head applies to the lines that have logits."""

    key: tuple[tuple[int, ...], tuple[tuple[int, int], ...]]  # the rows' deltas by id, and their sizes
    body: Plan | None
    head: Plan | None


class Compositions:
    """Plans compositions and keeps the last, which in decoding lasts until a row joins or leaves."""

    def __init__(self, ops: Ops, groups: Sequence[SiteGroup]) -> None:
        self._ops = ops
        self._head = next((group.index for group in groups if group.sites[0].name == HEAD), None)
        self._kept: Composition | None = None

    def of(self, deltas: Sequence[PackedDelta | None], sizes: Sequence[tuple[int, int]]) -> Composition:
        """``sizes[i]``: row i's tokens in this step, and how many of them have logits."""
        key = (tuple(id(delta) for delta in deltas), tuple(sizes))
        if self._kept is not None and self._kept.key == key:
            return self._kept
        body: list[Segment] = []
        head: list[Segment] = []
        tokens = lines = 0
        for delta, (count, wanted) in zip(deltas, sizes, strict=True):
            body.append(Segment(tokens, count, delta))
            if delta is not None and self._head in delta.patches:
                head.append(Segment(lines, wanted, delta))
            tokens += count
            lines += wanted
        self._kept = Composition(key, self._ops.plan(body, tokens), self._ops.plan(head, lines))
        return self._kept

    def forget(self, delta: PackedDelta) -> None:
        """A delta left the device: nothing kept here may name it any more."""
        if self._kept is not None and id(delta) in self._kept.key[0]:
            self._kept = None
