"""Concatenate and mask: the active deltas' factors side by side, two dense GEMMs a site and a block mask.

No custom kernel and a fixed number of operations whatever the number of deltas: what runs where no compiler is
found, and on a GPU, where decoding is bound by memory and the surplus arithmetic is free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import SitePatch
from deltas.batch import Hooked, Segment
from deltas.ops import reference
from deltas.ops.inputs import activate, block_input
from deltas.ops.transforms import BatchTransforms
from deltas.patches import Activation, BlockInput


@dataclass(frozen=True, slots=True)
class _Stacked:
    """The patches of one (columns, input, activation) class. ``mask`` ``[tokens, ranks]`` is 1 where a row owns a rank."""

    out0: int
    out: int
    reads: BlockInput | None
    activation: Activation
    down: Tensor | None  # [ranks, in]
    down_bias: Tensor | None  # [ranks]
    up: Tensor | None  # [ranks, out]
    mask: Tensor | None
    gain: Tensor | None  # [tokens, out]
    shift: Tensor | None  # [tokens, out]


@dataclass(eq=False)
class DensePlan:
    """Plans each group at its first use; ``tokens`` is the length of the packed batch."""

    segments: Sequence[Segment]
    tokens: int
    _groups: dict[int, list[_Stacked]] = field(default_factory=dict)

    @cached_property
    def _transforms(self) -> BatchTransforms:
        return BatchTransforms(self.segments)

    def active(self, group: int) -> bool:
        return any(s.delta is not None and group in s.delta.patches for s in self.segments)

    def feed(self, group: int, x: Tensor, columns: int, /) -> Tensor:
        return self._transforms.feed(group, x, columns)

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        self._transforms.apply(group, x, y, hooked)
        for segment in self.segments:
            if segment.delta is not None and group in segment.delta.alone:
                reference.apply_wide(segment.delta.rest[group], x, y, hooked, segment.slice)
        stacked = self._groups.get(group)
        if stacked is None:
            stacked = self._groups[group] = self._stack(group, x)
        before = y.clone() if any(s.reads is not None for s in stacked) else y
        for part in stacked:
            columns = y[:, part.out0 : part.out0 + part.out]
            if part.gain is not None:
                columns *= part.gain
            if part.down is not None and part.up is not None and part.mask is not None:
                z = block_input(part.reads, x, before, hooked, slice(None))
                h = activate(F.linear(z, part.down, part.down_bias), part.activation)
                # where, not a product: a poisoned delta's NaN must not reach its neighbours through 0 * NaN
                columns.addmm_(
                    torch.where(part.mask, h, torch.zeros((), dtype=h.dtype, device=h.device)), part.up
                )
            if part.shift is not None:
                columns += part.shift

    def _stack(self, group: int, x: Tensor) -> list[_Stacked]:
        classes: dict[tuple[int, int, BlockInput | None, Activation], list[tuple[Segment, SitePatch]]] = (
            defaultdict(list)
        )
        for segment in self.segments:
            if segment.delta is None or group in segment.delta.alone:
                continue
            for patch in segment.delta.rest.get(group, ()):
                if isinstance(patch, SitePatch):
                    classes[(patch.out0, patch.out, patch.reads, patch.activation)].append((segment, patch))
        return [self._stack_class(key, members, x) for key, members in classes.items()]

    def _stack_class(
        self,
        key: tuple[int, int, BlockInput | None, Activation],
        members: list[tuple[Segment, SitePatch]],
        x: Tensor,
    ) -> _Stacked:
        out0, out, reads, activation = key
        ranked = [(s, p) for s, p in members if p.down is not None and p.up is not None]
        downs = [p.down for _, p in ranked if p.down is not None]
        ups = [p.up for _, p in ranked if p.up is not None]
        mask = torch.zeros(self.tokens, sum(d.shape[0] for d in downs), dtype=torch.bool)
        at = 0
        for segment, patch in ranked:
            mask[segment.row0 : segment.row0 + segment.rows, at : at + patch.rank] = True
            at += patch.rank
        biases = [p.down_bias if p.down_bias is not None else x.new_zeros(p.rank) for _, p in ranked]
        has_bias = any(p.down_bias is not None for _, p in ranked)
        gain = shift = None
        if any(p.gain is not None for _, p in members):
            gain = x.new_ones(self.tokens, out)
            for segment, patch in members:
                if patch.gain is not None:
                    gain[segment.slice] = patch.gain
        if any(p.shift is not None for _, p in members):
            shift = x.new_zeros(self.tokens, out)
            for segment, patch in members:
                if patch.shift is not None:
                    shift[segment.slice] = patch.shift
        return _Stacked(
            out0,
            out,
            reads,
            activation,
            down=torch.cat(downs) if downs else None,
            down_bias=torch.cat(biases) if has_bias else None,
            up=torch.cat(ups) if ups else None,
            mask=mask.to(x.device) if downs else None,
            gain=gain,
            shift=shift,
        )
