"""Packing: a delta's patches into one arena, each group's steps in the order in which they apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deltas import sparse
from deltas.bank import Applied, PackedDelta, Placed, SitePatch
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.groups import Place, places
from deltas.patches import (
    Bottleneck,
    DenseDiff,
    EmbeddingLowRank,
    Fusion,
    Gain,
    GatedLowRank,
    Head,
    Kronecker,
    KVPrefix,
    LowRank,
    Patch,
    Shift,
    SoftPrompt,
    SparseDiff,
)
from deltas.sites import BackboneSpec, SiteKind
from deltas.tensors import map_tensors, surely_finite, tensors_of

ALIGN_BYTES = 64


def pack(
    patches: Sequence[Patch], spec: BackboneSpec, dtype: torch.dtype, *, pin: bool = False
) -> PackedDelta:
    """Patches -> one arena of ``dtype`` on the CPU (pinned memory if ``pin``).

    Raises :class:`UnsupportedDelta` for what one pass cannot apply exactly, :class:`InvalidDelta` for values that
    ``dtype`` cannot hold.
    """
    bound = bind(patches, spec, dtype)
    arena, placed = _place(bound.patches, dtype, pin)
    stacked = _stack(bound.prefixes, spec) if bound.prefixes and spec.kind == "decoder" else None
    return replace(
        bound,
        arena=arena,
        patches=placed,
        prefix=stacked,
        prefixes={} if stacked is not None else bound.prefixes,
    )


def bind(patches: Sequence[Patch], spec: BackboneSpec, dtype: torch.dtype) -> PackedDelta:
    """:func:`pack` without an arena: steps keep the patches' own floats, and prefixes stay by site on every backbone."""
    where = places(spec)
    sites: dict[str, list[Patch]] = {}
    prefixes: dict[str, list[KVPrefix]] = {}
    prompt: SoftPrompt | None = None
    head: Head | None = None
    for patch in patches:
        if isinstance(patch, SoftPrompt):
            prompt = patch
        elif isinstance(patch, Head):
            head = patch
        elif isinstance(patch, KVPrefix):
            prefixes.setdefault(patch.site, []).append(patch)
        else:
            sites.setdefault(patch.site, []).append(patch)
    by_group: dict[int, list[Place]] = {}
    for name in sites:
        by_group.setdefault(where[name].group.index, []).append(where[name])
    shift = 0 if prompt is None else len(prompt.embeddings)
    for parts in prefixes.values():
        shift = max(shift, sum(len(part.keys) for part in parts if part.shifts_positions))
    return PackedDelta(
        torch.empty(0, dtype=dtype),
        {group: tuple(_group_steps(by_group[group], sites)) for group in sorted(by_group)},
        None,
        None if prompt is None else prompt.embeddings.to(dtype).contiguous(),
        shift,
        {site: _join_prefixes(parts, dtype) for site, parts in prefixes.items()},
        prompt is not None and prompt.after_norm,
        map_tensors(head, lambda t: t.to(dtype)),
    )


def bind_trained(patches: Sequence[Patch], spec: BackboneSpec, dtype: torch.dtype) -> PackedDelta:
    """:func:`bind` for patches that gradients flow through, on the tensors' own device: floats are cast to ``dtype``,
    nothing is copied beside.

    A sparse change to a linear becomes a dense one: its gradient is gathered from one product, whatever its entries.
    """
    dense = [_as_dense(patch, spec) if isinstance(patch, SparseDiff) else patch for patch in patches]
    bound = bind(dense, spec, dtype)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return replace(bound, patches=map_tensors(bound.patches, cast))


def _as_dense(patch: SparseDiff, spec: BackboneSpec) -> SparseDiff | DenseDiff:
    site = spec.sites[patch.site]
    if site.kind is not SiteKind.LINEAR:
        return patch
    matrix = patch.values.new_zeros(site.weight_shape)
    return DenseDiff(patch.site, matrix.index_put((patch.rows, patch.columns), patch.values, accumulate=True))


_LAST = (DenseDiff, Kronecker, EmbeddingLowRank, GatedLowRank)


def _group_steps(members: list[Place], sites: Mapping[str, Sequence[Patch]]) -> list[Applied]:
    """The steps at one group, site by site in the order of their columns.

    Where a fused linear and a part of it are both changed, everything that transforms the backbone's own output comes
    before everything that is added to it, as at a single site.
    """
    ordered = sorted(members, key=lambda m: (m.out0, -m.site.out_features))
    ends = [m.out0 + m.site.out_features for m in ordered]
    apart = all(later.out0 >= end for end, later in zip(ends, ordered[1:], strict=False))
    pairs = [_steps(sites[m.site.name], m, split=not apart) for m in ordered]
    if not apart and sum(bool(before) for before, _ in pairs) > 1:
        raise UnsupportedDelta(
            f"{ordered[0].site.name} and a part of it both transform the backbone's own output, in no agreed order",
            field=ordered[0].site.name,
        )
    if apart:
        return [step for before, after in pairs for step in (*before, *after)]
    return [
        *(step for before, _ in pairs for step in before),
        *(step for _, after in pairs for step in after),
    ]


def _steps(patches: Sequence[Patch], place: Place, *, split: bool) -> tuple[list[Applied], list[Applied]]:
    """The steps at one site: what transforms the backbone's output, and what is added to it.

    Unless ``split``, an output gain is part of the addition's step, since the kernels take both at once.
    """
    out0, out = place.out0, place.site.out_features
    embedding = place.site.kind is SiteKind.EMBEDDING
    first: list[Applied] = []
    chain: list[Applied] = []
    last: list[Applied] = []
    nothing = fused = SitePatch(out0, out)
    for patch in patches:
        if embedding and isinstance(
            patch, Gain | Shift
        ):  # its input is token ids, which the kernels do not take
            (first if isinstance(patch, Gain) else last).append(Placed(out0, out, patch, embedding))
        elif isinstance(patch, Gain) and split:
            first.append(SitePatch(out0, out, gain=patch.gain))
        elif isinstance(patch, Gain):
            fused = replace(fused, gain=patch.gain)
        elif isinstance(patch, Shift):
            fused = replace(fused, shift=patch.beta.float())
        elif isinstance(patch, LowRank):
            fused = replace(fused, down=patch.down, up=patch.up)
        elif isinstance(patch, Bottleneck):
            chain.append(_bottleneck(patch, out0, out) if patch.plain else Placed(out0, out, patch))
        elif isinstance(patch, Fusion):
            chain.append(Placed(out0, out, patch))
        elif isinstance(patch, SparseDiff):
            rows, columns = (place.site.in_features, out) if embedding else (out, place.site.in_features)
            last.append(Placed(out0, out, sparse.packed(patch, rows, columns, embedding=embedding)))
        else:
            (last if isinstance(patch, _LAST) else first).append(Placed(out0, out, patch, embedding))
    middle: list[Applied] = [] if fused is nothing else [fused]
    return first, [*middle, *chain, *last]


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
    steps: Mapping[int, Sequence[Applied]], dtype: torch.dtype, pin: bool
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

    placed = {group: tuple(map_tensors(s, put)) for group, s in sorted(steps.items())}
    if not surely_finite([arena]) and not bool(
        torch.isfinite(arena).all()
    ):  # 0 * inf would reach other rows of a dense product
        raise InvalidDelta(f"a value of the delta is beyond {str(dtype)[6:]}, the backbone's dtype")
    return arena, placed


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
