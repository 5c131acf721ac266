"""Rows -> slots: what one forward pass needs to know about the deltas of its rows.

A batch is a list of segments: consecutive packed tokens that use one delta. It is planned once for a composition
of rows and applied at every site; only lengths change between decode steps, so plans are kept and reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deltas.bank import PackedDelta


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tokens ``row0 .. row0+rows`` of the packed batch use ``delta`` (None: the backbone alone)."""

    row0: int
    rows: int
    delta: PackedDelta | None

    @property
    def slice(self) -> slice:
        return slice(self.row0, self.row0 + self.rows)


class Hooked(Protocol):
    """What a step may ask of the module it changes, for the tokens of one segment (``rows``)."""

    fed: bool
    """Whether the module was given another input than the backbone's, by :meth:`Plan.feed`."""

    def linear(self, out0: int, out: int, x: Tensor, /) -> Tensor:
        """The backbone's own columns ``out0 .. out0+out`` of its group for another input ``[n, in]``, bias included."""
        ...

    def bias(self, out0: int, out: int, /) -> Tensor | None:
        """The backbone's own bias of those columns, ``[out]``, if it has one."""
        ...

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        """The hooked norm of ``x`` ``[n, width]`` with other parameters, ``[width]`` or one line a token."""
        ...

    def norm_change(self, x: Tensor, change: Tensor, /) -> Tensor:
        """What the hooked norm gives more for ``x`` ``[n, width]`` where its weight is ``change`` ``[width]`` more."""
        ...

    def inner(self, rows: slice, /) -> Tensor:
        """What the sublayer itself read, at a block site: ``[n, hidden]``."""
        ...

    def normed(self, x: Tensor, /) -> Tensor:
        """The norm that follows a block on post-norm backbones, of ``x`` ``[n, hidden]``."""
        ...


class Plan(Protocol):
    """How one composition of segments is applied. Made by ``ops.plan``."""

    def active(self, group: int) -> bool:
        """Does any row change anything at this group?"""
        ...

    def feed(self, group: int, x: Tensor, columns: int, /) -> Tensor:
        """What the linears of a group with ``columns`` outputs shall read, ``[tokens, in]``: ``x`` itself, or a copy
        with the rows transformed whose delta transforms the whole group's input. Then the hook says ``fed``, and
        :meth:`apply`, which is given ``x``, leaves those steps out."""
        ...

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        """Applies every row's steps to ``y`` ``[tokens, out]`` in place; ``x`` ``[tokens, in]`` is the group's input
        (the residual, for a block site; token ids int64 ``[tokens]``, for an embedding). Both are row-strided with
        contiguous columns."""
        ...


def merge(segments: Sequence[Segment]) -> list[Segment]:
    """Joins neighbours that use the same delta, and drops empty segments and those of the backbone alone.

    Rows whose delta has a gate stay apart: it averages over a row's own tokens.
    """
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.delta is segment.delta
            and last.row0 + last.rows == segment.row0
            and (segment.delta is None or not segment.delta.gated)
        ):
            joined[-1] = Segment(last.row0, last.rows + segment.rows, last.delta)
        elif segment.rows:
            joined.append(segment)
    return [segment for segment in joined if segment.delta is not None]
