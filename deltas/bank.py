"""The bank: deltas in the form in which a forward pass reads them.

A packed delta is one contiguous arena in the backbone's dtype: every factor, bias, gain and shift one after another,
each aligned to 64 bytes. It costs its own bytes, whatever its rank or sites; loading it is one copy, and the kernels
reach its pieces by address, so deltas of different ranks share a batch without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltas.errors import UnsupportedDelta
from deltas.groups import Place, places
from deltas.patches import (
    Activation,
    BlockInput,
    Bottleneck,
    DenseDiff,
    EmbeddingLowRank,
    EmbeddingRows,
    Gain,
    Kronecker,
    KVPrefix,
    LowRank,
    OutputRows,
    Patch,
    Shift,
    SoftPrompt,
    SparseDiff,
)
from deltas.sites import BackboneSpec, SiteKind
from deltas.tensors import map_tensors, tensors_of

ALIGN_BYTES = 64


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


Applied = SitePatch | Placed
"""One step at a group. A delta's steps at a group apply in their order."""


@dataclass(frozen=True)
class PackedDelta:
    """A delta ready for a device.

    ``patches``: group index -> the steps there, in order. ``prefix``: keys and values
    ``[layers, 2, kv_heads, n, head_dim]`` put before a row's own, or None. ``prompt``: embeddings ``[n, hidden]`` whose
    keys and values the engine has yet to compute into ``prefix``; real tokens' positions shift by ``shift``.
    ``prefixes``: the same by KV site for backbones that are not plain decoders. ``indices`` are the integer tensors
    of the patches, which cannot live in the arena.
    """

    arena: Tensor
    patches: dict[int, tuple[Applied, ...]]
    prefix: Tensor | None = None
    prompt: Tensor | None = None
    shift: int = 0
    prefixes: dict[str, KVPrefix] = field(default_factory=dict)
    prompt_after_norm: bool = False

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
    def looped(self) -> frozenset[int]:
        """The groups where not every step is a :class:`SitePatch` that the kernels can take in one table."""
        return frozenset(group for group, steps in self.patches.items() if not _is_plain(steps))

    @cached_property
    def alone(self) -> frozenset[int]:
        """The groups whose steps must be applied for this delta alone: looped ones, and chains at one place."""
        chained = {
            group
            for group, steps in self.patches.items()
            if len({(step.out0, step.out) for step in steps}) < len(steps)
        }
        return self.looped | chained

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the device, prefix and indices included."""
        extras = [t for t in (self.prefix, self.prompt) if t is not None]
        extras += [t for prefix in self.prefixes.values() for t in (prefix.keys, prefix.values)]
        extras += [
            t for steps in self.patches.values() for t in tensors_of(steps) if not t.is_floating_point()
        ]
        return sum(t.numel() * t.element_size() for t in [self.arena, *extras])

    def to(self, device: torch.device) -> PackedDelta:
        """The same delta on another device: one copy of the arena (and of the prefix)."""
        if self.arena.device == device:
            return self
        arena, start = self.arena.to(device, non_blocking=True), self.arena.storage_offset()

        def move(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.to(device, non_blocking=True)
            return arena.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - start)

        return replace(
            self,
            arena=arena,
            patches=map_tensors(self.patches, move),
            prefix=None if self.prefix is None else self.prefix.to(device, non_blocking=True),
            prompt=None if self.prompt is None else self.prompt.to(device, non_blocking=True),
            prefixes=map_tensors(self.prefixes, lambda t: t.to(device, non_blocking=True)),
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


def pack(
    patches: Sequence[Patch], spec: BackboneSpec, dtype: torch.dtype, *, pin: bool = False
) -> PackedDelta:
    """Patches -> one arena of ``dtype`` on the CPU (pinned memory if ``pin``).

    Raises :class:`UnsupportedDelta` for what one pass cannot apply exactly.
    """
    where = places(spec)
    sites: dict[str, list[Patch]] = {}
    prefixes: dict[str, list[KVPrefix]] = {}
    prompt: SoftPrompt | None = None
    for patch in patches:
        if isinstance(patch, SoftPrompt):
            prompt = patch
        elif isinstance(patch, KVPrefix):
            prefixes.setdefault(patch.site, []).append(patch)
        else:
            sites.setdefault(patch.site, []).append(patch)
    by_group: dict[int, list[Applied]] = {}
    for name in sorted(
        sites, key=lambda n: (where[n].group.index, where[n].out0, -where[n].site.out_features)
    ):
        by_group.setdefault(where[name].group.index, []).extend(_steps(sites[name], where[name]))
    arena, placed = _place(by_group, dtype, pin)
    joined = {site: _join_prefixes(parts, dtype) for site, parts in prefixes.items()}
    shift = 0 if prompt is None else len(prompt.embeddings)
    for parts in prefixes.values():
        shift = max(shift, sum(len(part.keys) for part in parts if part.shifts_positions))
    stacked = _stack(joined, spec) if joined and spec.kind == "decoder" else None
    return PackedDelta(
        arena,
        placed,
        stacked,
        None if prompt is None else prompt.embeddings.to(dtype).contiguous(),
        shift,
        {} if stacked is not None else joined,
        prompt is not None and prompt.after_norm,
    )


_LAST = (DenseDiff, SparseDiff, Kronecker, EmbeddingLowRank, EmbeddingRows, OutputRows)


def _steps(patches: Sequence[Patch], place: Place) -> list[Applied]:
    """The steps at one site in the order that ``patches.py`` defines: what transforms the backbone's output first."""
    out0, out = place.out0, place.site.out_features
    first: list[Applied] = []
    last: list[Applied] = []
    fused = SitePatch(out0, out)
    chain: list[Applied] = []
    for patch in patches:
        if place.site.kind is SiteKind.EMBEDDING and isinstance(patch, Gain | Shift):
            (first if isinstance(patch, Gain) else last).append(
                Placed(out0, out, patch)
            )  # its input is token ids
        elif isinstance(patch, Gain):
            fused = replace(fused, gain=patch.gain)
        elif isinstance(patch, Shift):
            fused = replace(fused, shift=patch.beta.float())
        elif isinstance(patch, LowRank):
            fused = replace(fused, down=patch.down, up=patch.up)
        elif isinstance(patch, Bottleneck):
            chain.append(_bottleneck(patch, out0, out))
        elif isinstance(patch, _LAST):
            last.append(Placed(out0, out, patch))
        else:
            first.append(Placed(out0, out, patch))
    middle: list[Applied] = [] if fused == SitePatch(out0, out) else [fused]
    return [*first, *middle, *chain, *last]


def _bottleneck(patch: Bottleneck, out0: int, out: int) -> SitePatch:
    return SitePatch(
        out0,
        out,
        down=patch.down,
        down_bias=patch.down_bias,
        up=patch.up,
        shift=patch.up_bias,
        activation=patch.activation,
        reads=patch.reads,
    )


def _place(
    steps: dict[int, list[Applied]], dtype: torch.dtype, pin: bool
) -> tuple[Tensor, dict[int, tuple[Applied, ...]]]:
    step = ALIGN_BYTES // dtype.itemsize

    def padded(count: int) -> int:
        return -(-count // step) * step

    total = sum(padded(t.numel()) for t in tensors_of(steps) if t.is_floating_point())
    arena = torch.zeros(total + step, dtype=dtype, pin_memory=pin)
    # torch aligns allocations to 64 bytes; a mapped or pinned one may not be, so start at the next multiple
    at = (-arena.data_ptr() % ALIGN_BYTES) // dtype.itemsize

    def put(tensor: Tensor) -> Tensor:
        nonlocal at
        if not tensor.is_floating_point():
            return tensor
        view = arena[at : at + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        at += padded(tensor.numel())
        return view

    return arena, {group: tuple(map_tensors(s, put)) for group, s in sorted(steps.items())}


def _join_prefixes(parts: Iterable[KVPrefix], dtype: torch.dtype) -> KVPrefix:
    """All prefixes of one site, those that shift positions first."""
    ordered = sorted(parts, key=lambda part: not part.shifts_positions)
    keys = torch.cat([part.keys for part in ordered]).to(dtype)
    values = torch.cat([part.values for part in ordered]).to(dtype)
    return replace(ordered[0], keys=keys, values=values)


def _stack(prefixes: dict[str, KVPrefix], spec: BackboneSpec) -> Tensor:
    sites = [site.name for site in spec.of_kind(SiteKind.KV)]
    lengths = {len(prefix.keys) for prefix in prefixes.values()}
    if set(prefixes) != set(sites) or len(lengths) != 1:
        missing = sorted(set(sites) - set(prefixes)) or sites
        raise UnsupportedDelta(
            f"a prefix must have every layer, of one length; missing or different: {missing[:4]}",
            field=missing[0],
        )
    layers = [torch.stack([prefixes[s].keys, prefixes[s].values]) for s in sites]
    return torch.stack(layers).transpose(2, 3).contiguous()  # from [layers, 2, n, kv_heads, head_dim]
