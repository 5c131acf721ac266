"""Sums of deltas: what each changes relative to the backbone, weighted and added, where that is exact.

The same rules join the components of one delta. Bottlenecks chain in order instead, each reading what the one before
left; trained token rows join where they name different tokens; what has no agreed meaning together is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from deltas.errors import UnsupportedDelta
from deltas.patches import (
    Bottleneck,
    Coupling,
    DenseDiff,
    EmbeddingLowRank,
    EmbeddingRows,
    Fusion,
    Gain,
    GatedGain,
    GatedLowRank,
    Head,
    InputGain,
    Kronecker,
    KVPrefix,
    LowRank,
    Mix,
    OutputRows,
    Override,
    Patch,
    Rotation,
    Shift,
    SoftPrompt,
    SparseDiff,
)
from deltas.weights import SiteWeights

# What replaces or transforms the backbone's own output, hence stands alone among these at a site.
_EXCLUSIVE = (Override, InputGain, Rotation, Mix, Gain, GatedGain, Coupling)
# What applies in order at a block, each reading what the one before it left.
_CHAINED = (Bottleneck, Fusion)


def weighted(patch: Patch, weight: float, weights: SiteWeights) -> Patch:
    """The patch whose change, relative to the backbone, is ``weight`` times as large.

    Raises :class:`UnsupportedDelta` for what cannot be scaled exactly: prompts and prefixes, which act through
    attention's normalisation.
    """
    if weight == 1.0:
        return patch
    match patch:
        case LowRank(up=up) | EmbeddingLowRank(up=up) | GatedLowRank(up=up):
            return replace(patch, up=up * weight)
        case Shift(beta=beta):
            return replace(patch, beta=beta * weight)
        case Gain(gain=gain) | InputGain(gain=gain):
            return replace(patch, gain=1 + weight * (gain - 1))
        case Rotation(blocks=blocks):
            identity = torch.eye(blocks.shape[-1])
            return replace(patch, blocks=identity + weight * (blocks - identity))
        case Mix(own=own, other=other):
            return replace(patch, own=1 + weight * (own - 1), other=other * weight)
        case DenseDiff(matrix=matrix):
            return replace(patch, matrix=matrix * weight)
        case SparseDiff(values=values):
            return replace(patch, values=values * weight)
        case Kronecker(left=left):
            return replace(patch, left=left * weight)
        case GatedGain(gain=gain, rest=rest):
            return replace(patch, gain=gain * weight, rest=1 + weight * (rest - 1))
        case Bottleneck(up=up, up_bias=up_bias) if patch.plain:
            return replace(patch, up=up * weight, up_bias=up_bias * weight)
        case Bottleneck(share=share) | Fusion(share=share) | Coupling(share=share):
            return replace(patch, share=share * weight)
        case Override() | EmbeddingRows() | OutputRows():
            return _towards(patch, weight, weights)
        case Head():
            raise UnsupportedDelta("a task head has no multiple; give it weight 1", field="model")
        case SoftPrompt() | KVPrefix():
            raise UnsupportedDelta(
                "a prompt or a prefix has no exact multiple: it acts through attention; give it weight 1",
                field="model",
            )


def _towards(
    patch: Override | EmbeddingRows | OutputRows, weight: float, weights: SiteWeights
) -> Override | EmbeddingRows | OutputRows:
    """Absolute values, ``weight`` of the way from the backbone's own."""
    site = weights.spec.sites[patch.site]
    own = weights.weight(site)
    if isinstance(patch, EmbeddingRows | OutputRows):
        start = own[patch.indices]
        return replace(patch, rows=start + weight * (patch.rows - start))
    bias, own_bias = patch.bias, weights.bias(site)
    if bias is not None or own_bias is not None:
        a = torch.zeros(site.out_features) if own_bias is None else own_bias
        b = torch.zeros(site.out_features) if bias is None else bias
        bias = a + weight * (b - a)
    return replace(patch, weight=own + weight * (patch.weight - own), bias=bias)


def scaled(patches: Sequence[Patch], weight: float, weights: SiteWeights) -> list[Patch]:
    """All patches of one component by :func:`weighted`; refuses two transformations one after the other."""
    if weight != 1.0:
        where = Counter(patch.site for patch in patches if isinstance(patch, _EXCLUSIVE))
        for site, count in where.items():
            if count > 1:
                raise UnsupportedDelta(
                    f"{site}: a rotation with a gain has no exact multiple; give it weight 1", field=site
                )
    return [weighted(patch, weight, weights) for patch in patches]


def combine(parts: Iterable[Sequence[Patch]]) -> list[Patch]:
    """One list of patches that does what all the lists do together, at most one of each additive kind per site.

    Raises :class:`UnsupportedDelta`, ``field`` naming the site, for patches that have no agreed meaning together.
    """
    joined: dict[tuple[type, str], list[Patch]] = {}
    prompts: list[SoftPrompt] = []
    heads: list[Head] = []
    parts = list(parts)
    for part in parts:
        for patch in part:
            if isinstance(patch, SoftPrompt):
                prompts.append(patch)
                continue
            if isinstance(patch, Head):
                heads.append(patch)
                continue
            kind = Bottleneck if isinstance(patch, _CHAINED) else type(patch)
            have = joined.setdefault((kind, patch.site), [])
            have[:] = [*have[:-1], *_join(have[-1], patch)] if have else [patch]
    result: list[Patch] = [patch for have in joined.values() for patch in have]
    _check_positions(prompts, [p for p in result if isinstance(p, KVPrefix)])
    _check_exclusive(parts)
    if len(heads) > 1:
        raise UnsupportedDelta("two task heads: a row has one answer", field="head")
    return [*prompts, *result, *heads]


def _join(first: Patch, second: Patch) -> list[Patch]:
    match first, second:
        case LowRank(), LowRank():
            down, up = torch.cat([first.down, second.down]), torch.cat([first.up, second.up])
            return [replace(first, down=down, up=up)]
        case Shift(), Shift():
            return [replace(first, beta=first.beta + second.beta)]
        case DenseDiff(), DenseDiff():
            return [replace(first, matrix=first.matrix + second.matrix)]
        case SparseDiff(), SparseDiff():
            return [
                replace(
                    first,
                    rows=torch.cat([first.rows, second.rows]),
                    columns=torch.cat([first.columns, second.columns]),
                    values=torch.cat([first.values, second.values]),
                )
            ]
        case EmbeddingLowRank(), EmbeddingLowRank():
            table = torch.cat([first.table, second.table], dim=1)
            return [replace(first, table=table, up=torch.cat([first.up, second.up]))]
        case Kronecker(), Kronecker():
            return [first, second]
        case Bottleneck() | Fusion(), Bottleneck() | Fusion():
            return [first, second]
        case GatedLowRank(), GatedLowRank():
            return [first, second]
        case EmbeddingRows(), EmbeddingRows():
            return [_join_rows(first, second)]
        case OutputRows(), OutputRows():
            return [_join_rows(first, second)]
        case InputGain(), InputGain():
            return [replace(first, gain=first.gain * second.gain)]
        case Gain(), Gain() if first.multiplies and second.multiplies:
            return [replace(first, gain=first.gain * second.gain)]
        case Gain(), Gain() if not first.multiplies and not second.multiplies:
            return [replace(first, gain=first.gain + second.gain - 1)]
        case KVPrefix(), KVPrefix() if first.gate is not None or second.gate is not None:
            raise UnsupportedDelta(
                f"two prefixes at {first.site}, and one of them has a gate, are not served", field=first.site
            )
        case KVPrefix(), KVPrefix() if (first.shifts_keys, first.unbiased) != (
            second.shifts_keys,
            second.unbiased,
        ):
            raise UnsupportedDelta(
                f"two prefixes at {first.site} that place the row's own tokens differently", field=first.site
            )
        case KVPrefix(), KVPrefix():
            if first.shifts_positions or second.shifts_positions:
                return [first, second]  # whether both do is for _check_positions
            keys, values = torch.cat([first.keys, second.keys]), torch.cat([first.values, second.values])
            return [replace(first, keys=keys, values=values)]
        case _:
            site = getattr(first, "site", "")
            raise UnsupportedDelta(
                f"two {type(first).__name__} changes at {site} have no agreed meaning together", field=site
            )


_Rows = TypeVar("_Rows", EmbeddingRows, OutputRows)


def _join_rows(first: _Rows, second: _Rows) -> _Rows:
    shared = set(first.indices.tolist()) & set(second.indices.tolist())
    if shared:
        raise UnsupportedDelta(
            f"both replace the embedding of token {min(shared)} at {first.site}", field=first.site
        )
    indices = torch.cat([first.indices, second.indices])
    return replace(first, indices=indices, rows=torch.cat([first.rows, second.rows]))


def _check_positions(prompts: Sequence[SoftPrompt], prefixes: Sequence[KVPrefix]) -> None:
    """A row's own tokens can start at one position only."""
    shifting = Counter(prefix.site for prefix in prefixes if prefix.shifts_positions)
    if len(prompts) + max(shifting.values(), default=0) > 1:
        raise UnsupportedDelta(
            "two prompts or prefixes both shift the positions of a row's own tokens; one may",
            field="positions",
        )


def _check_exclusive(parts: Iterable[Sequence[Patch]]) -> None:
    """One kind of transformation a site, but for a part's own: its input first, then a gain of the output (as BOFT has)."""
    seen: dict[str, dict[type, set[int]]] = {}
    for index, part in enumerate(parts):
        for patch in part:
            if isinstance(patch, _EXCLUSIVE):
                seen.setdefault(patch.site, {}).setdefault(type(patch), set()).add(index)
    for site, kinds in seen.items():
        ordered = set(kinds) in ({Rotation, Gain}, {InputGain, Gain})
        if len(kinds) > 1 and not (ordered and len(set().union(*kinds.values())) == 1):
            names = " and ".join(kind.__name__ for kind in kinds)
            raise UnsupportedDelta(
                f"{names} at {site}: each transforms the backbone's own output, in no agreed order",
                field=site,
            )
