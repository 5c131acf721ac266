"""The bank: deltas in the form in which a forward pass reads them.

Sites that read the same input are one *group* (query, key and value; gate and up), applied in one pass. A packed
delta is one contiguous arena in the backbone's dtype: every factor, bias and shift one after another, each aligned
to 64 bytes. It costs its own bytes, whatever its rank or sites; loading it is one copy, and the kernels reach its
pieces by address, so deltas of different ranks share a batch without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deltas.errors import UnsupportedDelta
from deltas.patches import Activation, BlockInput, Bottleneck, KVPrefix, LowRank, Patch, Shift, SoftPrompt
from deltas.sites import BackboneSpec, Site, SiteKind

ALIGN_BYTES = 64
FUSED = (("attn", ("q", "k", "v")), ("mlp", ("gate", "up")))


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites that read one input; their outputs lie side by side, site j at columns ``offsets[j]``."""

    index: int
    kind: SiteKind
    sites: tuple[Site, ...]
    offsets: tuple[int, ...]

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def out_features(self) -> int:
        return self.offsets[-1] + self.sites[-1].out_features


def site_groups(spec: BackboneSpec) -> list[SiteGroup]:
    """The groups of a backbone, in forward order. Embedding and KV sites are in none."""
    groups: list[SiteGroup] = []
    taken: set[str] = set()
    for name, site in spec.sites.items():
        if name in taken or site.kind not in (SiteKind.LINEAR, SiteKind.NORM, SiteKind.BLOCK):
            continue
        members = _fused_with(name, spec) if site.kind is SiteKind.LINEAR else (site,)
        offsets = [0]
        for member in members[:-1]:
            offsets.append(offsets[-1] + member.out_features)
        groups.append(SiteGroup(len(groups), site.kind, members, tuple(offsets)))
        taken.update(member.name for member in members)
    return groups


def _fused_with(name: str, spec: BackboneSpec) -> tuple[Site, ...]:
    stem, _, leaf = name.rpartition(".")
    for block, leaves in FUSED:
        if stem.endswith(f".{block}") and leaf == leaves[0]:
            members = [spec.sites.get(f"{stem}.{other}") for other in leaves]
            found = tuple(member for member in members if member is not None)
            if len(found) == len(leaves):
                return found
    return (spec.sites[name],)


@dataclass(frozen=True, slots=True)
class SitePatch:
    """Everything one delta changes at one site, as views into its arena (dtypes are the arena's).

    ``y[:, out0:out0+out] += up^T f(down z + down_bias) + shift`` where ``z`` is by ``reads``: the site's input for
    None, else as :class:`BlockInput` says. ``down`` ``[rank, in]``, ``up`` ``[rank, out]``; None where absent.
    """

    out0: int
    out: int
    down: Tensor | None = None
    down_bias: Tensor | None = None
    up: Tensor | None = None
    shift: Tensor | None = None
    activation: Activation = Activation.IDENTITY
    reads: BlockInput | None = None

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def tensors(self) -> list[Tensor]:
        """The tensors that are there, in the order in which the arena holds them."""
        return [t for t in (self.down, self.down_bias, self.up, self.shift) if t is not None]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> SitePatch:
        """The same patch with every tensor changed, in the arena's order."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        down, down_bias, up, shift = of(self.down), of(self.down_bias), of(self.up), of(self.shift)
        return replace(self, down=down, down_bias=down_bias, up=up, shift=shift)


@dataclass(frozen=True)
class PackedDelta:
    """A delta ready for a device.

    ``patches``: group index -> what changes there. ``prefix``: keys and values ``[layers, 2, kv_heads, n, head_dim]``
    put before a row's own, or None. ``prompt``: embeddings ``[n, hidden]`` whose keys and values the engine has yet
    to compute into ``prefix``. ``shifts_positions``: whether a row's own tokens start at position n.
    """

    arena: Tensor
    patches: dict[int, tuple[SitePatch, ...]]
    prefix: Tensor | None = None
    prompt: Tensor | None = None
    shifts_positions: bool = True

    @property
    def prefix_length(self) -> int:
        if self.prefix is not None:
            return int(self.prefix.shape[3])
        return 0 if self.prompt is None else int(self.prompt.shape[0])

    @cached_property
    def widest(self) -> int:
        """The largest rank or bottleneck width at any site."""
        return max((patch.rank for patches in self.patches.values() for patch in patches), default=0)

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the device, prefix included."""
        size = self.arena.numel() * self.arena.element_size()
        for extra in (self.prefix, self.prompt):
            if extra is not None:
                size += extra.numel() * extra.element_size()
        return size

    def to(self, device: torch.device) -> PackedDelta:
        """The same delta on another device: one copy of the arena (and of the prefix)."""
        if self.arena.device == device:
            return self
        arena = self.arena.to(device, non_blocking=True)
        return replace(
            self,
            arena=arena,
            patches={g: tuple(_rebase(p, self.arena, arena) for p in ps) for g, ps in self.patches.items()},
            prefix=None if self.prefix is None else self.prefix.to(device, non_blocking=True),
            prompt=None if self.prompt is None else self.prompt.to(device, non_blocking=True),
        )

    def with_prefix(self, prefix: Tensor) -> PackedDelta:
        """This delta with its prompt's keys and values computed."""
        return replace(self, prefix=prefix, prompt=None)


def _rebase(patch: SitePatch, old: Tensor, new: Tensor) -> SitePatch:
    start = old.storage_offset()
    return patch.mapped(lambda t: new.as_strided(t.shape, t.stride(), t.storage_offset() - start))


def pack(
    patches: Sequence[Patch], spec: BackboneSpec, dtype: torch.dtype, *, pin: bool = False
) -> PackedDelta:
    """Patches -> one arena of ``dtype`` on the CPU (pinned memory if ``pin``).

    Raises :class:`UnsupportedDelta` for a combination that one pass cannot apply exactly.
    """
    where = {site.name: (g, j) for g in site_groups(spec) for j, site in enumerate(g.sites)}
    merged: dict[tuple[int, int], SitePatch] = {}
    prefixes: list[KVPrefix] = []
    prompt: Tensor | None = None
    for patch in patches:
        if isinstance(patch, KVPrefix):
            prefixes.append(patch)
        elif isinstance(patch, SoftPrompt):
            prompt = patch.embeddings.to(dtype).contiguous()
        else:
            group, j = where[patch.site]
            key = (group.index, j)
            merged[key] = _merge(merged.get(key), patch, group, j)
    arena, placed = _place(merged, dtype, pin)
    by_group: dict[int, list[SitePatch]] = {}
    for (g, _), site_patch in sorted(placed.items()):
        by_group.setdefault(g, []).append(site_patch)
    prefix, shifts = _stack_prefix(prefixes, spec, dtype)
    return PackedDelta(arena, {g: tuple(ps) for g, ps in by_group.items()}, prefix, prompt, shifts)


def _merge(
    have: SitePatch | None, patch: LowRank | Shift | Bottleneck, group: SiteGroup, j: int
) -> SitePatch:
    have = have or SitePatch(out0=group.offsets[j], out=group.sites[j].out_features)
    if isinstance(patch, Shift):
        beta = patch.beta.float()
        return replace(have, shift=beta if have.shift is None else have.shift + beta)
    if have.down is not None:
        raise UnsupportedDelta(f"two {type(patch).__name__} patches at {patch.site}", field=patch.site)
    if isinstance(patch, LowRank):
        return replace(have, down=patch.down, up=patch.up)
    up_bias = patch.up_bias.float()
    return replace(
        have,
        down=patch.down,
        down_bias=patch.down_bias,
        up=patch.up,
        shift=up_bias if have.shift is None else have.shift + up_bias,
        activation=patch.activation,
        reads=patch.reads,
    )


def _place(
    merged: dict[tuple[int, int], SitePatch], dtype: torch.dtype, pin: bool
) -> tuple[Tensor, dict[tuple[int, int], SitePatch]]:
    step = ALIGN_BYTES // dtype.itemsize

    def padded(count: int) -> int:
        return -(-count // step) * step

    total = sum(padded(t.numel()) for p in merged.values() for t in p.tensors())
    arena = torch.zeros(total + step, dtype=dtype, pin_memory=pin)
    # torch aligns allocations to 64 bytes; a mapped or pinned one may not be, so start at the next multiple
    at = (-arena.data_ptr() % ALIGN_BYTES) // dtype.itemsize

    def put(tensor: Tensor) -> Tensor:
        nonlocal at
        view = arena[at : at + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        at += padded(tensor.numel())
        return view

    return arena, {key: patch.mapped(put) for key, patch in sorted(merged.items(), key=lambda item: item[0])}


def _stack_prefix(
    prefixes: Iterable[KVPrefix], spec: BackboneSpec, dtype: torch.dtype
) -> tuple[Tensor | None, bool]:
    by_site = {prefix.site: prefix for prefix in prefixes}
    if not by_site:
        return None, True
    sites = [site.name for site in spec.of_kind(SiteKind.KV)]
    if set(by_site) != set(sites):
        missing = sorted(set(sites) - set(by_site))
        raise UnsupportedDelta(f"a prefix must have every layer; missing {missing[:4]}", field=missing[0])
    layers = [torch.stack([by_site[s].keys, by_site[s].values]) for s in sites]
    stacked = torch.stack(layers).to(dtype)  # [layers, 2, n, kv_heads, head_dim]
    return stacked.transpose(2, 3).contiguous(), by_site[sites[0]].shifts_positions
