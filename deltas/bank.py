"""The bank: deltas in the form in which a forward pass reads them.

A packed delta is one contiguous arena in the backbone's dtype: every factor, bias, gain and shift one after another,
each aligned to 64 bytes. It costs its own bytes, whatever its rank or sites; loading it is one copy, and the kernels
reach its pieces by address, so deltas of different ranks share a batch without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltas.patches import Activation, BlockInput, Head, InputGain, KVPrefix, Override, Rotation
from deltas.tensors import map_tensors, tensors_of


@dataclass(frozen=True, slots=True)
class SitePatch:
    """What the kernels apply in one go, as views into the arena (dtypes are the arena's).

    ``y[:, out0:out0+out] = gain * y + up^T f(down z + down_bias) + shift`` where ``z`` is by ``reads``: the site's
    input for None, else as :class:`BlockInput` says. ``down`` ``[rank, in]``, ``up`` ``[rank, out]``, ``gain`` and
    ``shift`` ``[out]``; None where absent.
    """

    out0: int
    out: int
    down: Tensor | None = None
    down_bias: Tensor | None = None
    up: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    activation: Activation = Activation.IDENTITY
    reads: BlockInput | None = None

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Placed:
    """Any other patch, at columns ``out0 .. out0+out`` of its group; applied by torch operations (``ops/placed.py``)."""

    out0: int
    out: int
    patch: Any
    embedding: bool = False

    @property
    def transforms(self) -> bool:
        """Does it give the backbone's module another input, or a norm other values? Then it is applied first."""
        match self.patch:
            case InputGain() | Rotation():
                return not self.embedding
            case Override(weight=weight):
                return bool(weight.dim() == 1)
            case _:
                return False


Applied = SitePatch | Placed
"""One step at a group. A delta's steps at a group apply in their order."""


@dataclass(frozen=True)
class PackedDelta:
    """A delta ready for a device.

    ``patches``: group index -> the steps there, in order. ``prefix``: keys and values
    ``[layers, 2, kv_heads, n, head_dim]`` put before a row's own, or None. ``prompt``: embeddings ``[n, hidden]`` whose
    keys and values the engine has yet to compute into ``prefix``; real tokens' positions shift by ``shift``.
    ``prefixes``: the same by KV site for backbones that are not plain decoders. ``prompt_after_norm``: see
    :class:`~deltas.patches.SoftPrompt`. ``head``: a task head, applied by who runs the rows.
    """

    arena: Tensor
    patches: dict[int, tuple[Applied, ...]]
    prefix: Tensor | None = None
    prompt: Tensor | None = None
    shift: int = 0
    prefixes: dict[str, KVPrefix] = field(default_factory=dict)
    prompt_after_norm: bool = False
    head: Head | None = None

    @property
    def prefix_length(self) -> int:
        """Tokens' worth of keys and values before a row's own."""
        length = 0 if self.prefix is None else int(self.prefix.shape[3])
        return length + (0 if self.prompt is None else int(self.prompt.shape[0]))

    @cached_property
    def widest(self) -> int:
        """The largest rank or bottleneck width at any site."""
        steps = (step for steps in self.patches.values() for step in steps)
        return max((step.rank for step in steps if isinstance(step, SitePatch)), default=0)

    @cached_property
    def transforms(self) -> dict[int, tuple[Placed, ...]]:
        """By group, the steps that are applied before all others, for many deltas at once."""
        found = {
            group: tuple(step for step in steps if isinstance(step, Placed) and step.transforms)
            for group, steps in self.patches.items()
        }
        return {group: steps for group, steps in found.items() if steps}

    @cached_property
    def rest(self) -> dict[int, tuple[Applied, ...]]:
        """By group, the steps that are left then."""
        found = {
            group: tuple(step for step in steps if isinstance(step, SitePatch) or not step.transforms)
            for group, steps in self.patches.items()
        }
        return {group: steps for group, steps in found.items() if steps}

    @cached_property
    def looped(self) -> frozenset[int]:
        """The groups where not every step left is a :class:`SitePatch` that the kernels can take in one table."""
        return frozenset(group for group, steps in self.rest.items() if not _is_plain(steps))

    @cached_property
    def alone(self) -> frozenset[int]:
        """The groups whose steps must be applied for this delta alone: looped ones, and chains at one place."""
        chained = {
            group
            for group, steps in self.rest.items()
            if len({(step.out0, step.out) for step in steps}) < len(steps)
        }
        return self.looped | chained

    @cached_property
    def gated(self) -> bool:
        """Whether something depends on all tokens of a row: then neighbouring rows must stay segments of their own."""
        steps = (step for steps in self.patches.values() for step in steps)
        return any(
            getattr(step.patch, "gate", None) is not None for step in steps if isinstance(step, Placed)
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the device, prefix and indices included."""
        extras = [t for t in (self.prefix, self.prompt) if t is not None]
        extras += [t for prefix in self.prefixes.values() for t in (prefix.keys, prefix.values)]
        extras += list(tensors_of(self.head))
        extras += [
            t for steps in self.patches.values() for t in tensors_of(steps) if not t.is_floating_point()
        ]
        return sum(t.numel() * t.element_size() for t in [self.arena, *extras])

    def to(self, device: torch.device) -> PackedDelta:
        """The same delta on another device: one copy of the arena (and of the prefix)."""
        if self.arena.device == device:
            return self
        ahead = device.type != "cpu"  # what comes to the host may be read at once
        arena, start = self.arena.to(device, non_blocking=ahead), self.arena.storage_offset()

        def move(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.to(device, non_blocking=ahead)
            return arena.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - start)

        return replace(
            self,
            arena=arena,
            patches=map_tensors(self.patches, move),
            prefix=None if self.prefix is None else self.prefix.to(device, non_blocking=ahead),
            prompt=None if self.prompt is None else self.prompt.to(device, non_blocking=ahead),
            prefixes=map_tensors(self.prefixes, lambda t: t.to(device, non_blocking=ahead)),
            head=map_tensors(self.head, lambda t: t.to(device, non_blocking=ahead)),
        )

    def with_prefix(self, prefix: Tensor) -> PackedDelta:
        """This delta with its prompt's keys and values computed; ``prefix`` holds its own prefix too."""
        return replace(self, prefix=prefix, prompt=None)


_KERNEL_READS = (None, BlockInput.OUTPUT, BlockInput.OUTPUT_AND_RESIDUAL, BlockInput.RESIDUAL)


def _is_plain(steps: Sequence[Applied]) -> bool:
    """Can the kernels apply these from one table? Its lines may overlap only with the line directly before."""
    at_end = 0
    for n, step in enumerate(steps):
        if not isinstance(step, SitePatch) or step.reads not in _KERNEL_READS:
            return False
        if (
            n and step.out0 < at_end
        ):  # overlaps: exactly the columns of its predecessor, or nothing is certain
            before = steps[n - 1]
            if (step.out0, step.out) != (before.out0, before.out):
                return False
        at_end = max(at_end, step.out0 + step.out)
    return True
