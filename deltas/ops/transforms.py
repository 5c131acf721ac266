"""Steps that transform the backbone's own output, for all short segments at once.

Where a delta scales or rotates the input of everything that a group computes, the backbone's own product reads those
rows transformed. Where it does so for some of the group's columns only, its rows need another product of the same weight:
one for all such rows of the batch, whatever their deltas, not one for each delta. Norms with values of their own likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltas.bank import Placed
from deltas.batch import Hooked, Segment
from deltas.ops import placed
from deltas.patches import InputGain, Override


@dataclass(frozen=True, slots=True)
class Transforms:
    """All segments' transforms of one kind at one range of columns; ``rows`` int64 are their tokens, in order."""

    out0: int
    out: int
    rows: Tensor
    members: tuple[tuple[Segment, Placed], ...]
    values: Tensor | None  # input gains or norm weights, one line a token
    biases: Tensor | None  # of norms

    def inputs(self, x: Tensor) -> Tensor:
        """What the linear reads for these rows, in order, ``[rows, in]``."""
        if self.values is not None:
            return x[self.rows] * self.values
        return torch.cat([placed.rotated(x[s.slice], step.patch.blocks) for s, step in self.members])

    @property
    def of_input(self) -> bool:
        """Do they change what a linear reads, and not a norm?"""
        return not isinstance(self.members[0][1].patch, Override)

    def apply(self, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        columns = y[:, self.out0 : self.out0 + self.out]
        if self.of_input:
            columns[self.rows] = hooked.linear(self.out0, self.out, self.inputs(x))
        elif self.values is not None:
            columns[self.rows] = hooked.norm(x[self.rows], self.values, self.biases)


class BatchTransforms:
    """The transforms of a batch's segments, by group."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._groups = _transforms_of(segments)
        self._once = {group for group, found in self._groups.items() if _are_disjoint(found)}

    def __contains__(self, group: int) -> bool:
        return group in self._groups

    def feed(self, group: int, x: Tensor, columns: int, /) -> Tensor:
        """As :meth:`deltas.batch.Plan.feed`: a copy only where every transform of this group can be in it."""
        found = self._groups.get(group)
        if found is None or group not in self._once:
            return x
        if not all(t.of_input and t.out0 == 0 and t.out == columns for t in found):
            return x
        fed = x.clone()
        for transforms in found:
            fed[transforms.rows] = transforms.inputs(x)
        return fed

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        """Applies them to the backbone's output ``y``, unless the module was fed with them."""
        if hooked.fed:
            return
        for transforms in self._groups.get(group, ()):
            transforms.apply(x, y, hooked)


def _are_disjoint(found: list[Transforms]) -> bool:
    """Has no row two of them?"""
    rows = torch.cat([transforms.rows for transforms in found])
    return len(torch.unique(rows)) == len(rows)


def _transforms_of(segments: Sequence[Segment]) -> dict[int, list[Transforms]]:
    """By group, the transforms of these segments, of one kind and place each."""
    classes: dict[tuple[int, type, int, int, bool], list[tuple[Segment, Placed]]] = {}
    for segment in segments:
        if segment.delta is None:
            continue
        for group, steps in segment.delta.transforms.items():
            for step in steps:
                has_bias = getattr(step.patch, "bias", None) is not None
                key = (group, type(step.patch), step.out0, step.out, has_bias)
                classes.setdefault(key, []).append((segment, step))
    found: dict[int, list[Transforms]] = {}
    for (group, _, out0, out, _), members in classes.items():
        found.setdefault(group, []).append(_class(out0, out, members))
    return found


def _class(out0: int, out: int, members: list[tuple[Segment, Placed]]) -> Transforms:
    patches = [step.patch for _, step in members]
    device = members[0][0].delta.arena.device if members[0][0].delta is not None else None
    rows = torch.cat([torch.arange(s.row0, s.row0 + s.rows) for s, _ in members]).to(device)

    def lines(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.expand(s.rows, -1) for (s, _), t in zip(members, tensors, strict=True)])

    values = biases = None
    if isinstance(patches[0], InputGain):
        values = lines([p.gain for p in patches])
    elif isinstance(patches[0], Override):
        values = lines([p.weight for p in patches])
        biases = lines([p.bias for p in patches]) if patches[0].bias is not None else None
    return Transforms(out0, out, rows, tuple(members), values, biases)
