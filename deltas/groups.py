"""Groups: sites that read one input (query, key and value; gate and up), applied in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from deltas.sites import BackboneSpec, Site, SiteKind

FUSED = (("attn", ("q", "k", "v")), ("cross", ("k", "v")), ("mlp", ("gate", "up")))
_PATCHED = (SiteKind.LINEAR, SiteKind.NORM, SiteKind.BLOCK, SiteKind.EMBEDDING)


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Modules that read one input; their outputs lie side by side, module j at columns ``offsets[j]``.

    ``decoder``: its tokens are an encoder-decoder's output tokens (its decoder's, but for the keys and values of
    cross-attention, which are made of the encoder's tokens).
    """

    index: int
    kind: SiteKind
    sites: tuple[Site, ...]
    offsets: tuple[int, ...]
    decoder: bool = False

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def out_features(self) -> int:
        return self.offsets[-1] + self.sites[-1].out_features


@dataclass(frozen=True, slots=True)
class Place:
    """Where a site's output is: columns ``out0 .. out0 + site.out_features`` of its group."""

    group: SiteGroup
    site: Site
    out0: int


def site_groups(spec: BackboneSpec) -> list[SiteGroup]:
    """The groups of a backbone, in forward order. KV sites are in none; parts of a fused linear are in its group."""
    groups: list[SiteGroup] = []
    taken: set[str] = set()
    for name, site in spec.sites.items():
        if name in taken or site.part or site.kind not in _PATCHED:
            continue
        members = _fused_with(name, spec) if site.kind is SiteKind.LINEAR else (site,)
        offsets = [0]
        for member in members[:-1]:
            offsets.append(offsets[-1] + member.out_features)
        groups.append(SiteGroup(len(groups), site.kind, members, tuple(offsets), _of_decoder(name, spec)))
        taken.update(member.name for member in members)
    return groups


@lru_cache(maxsize=8)
def places(spec: BackboneSpec) -> Mapping[str, Place]:
    """Site name -> its place, parts of fused linears included. Kept by spec: every delta that is packed asks."""
    found = {
        site.name: Place(group, site, offset)
        for group in site_groups(spec)
        for site, offset in zip(group.sites, group.offsets, strict=True)
    }
    whole = {place.site.path: place for place in found.values() if place.group.kind is SiteKind.LINEAR}
    for site in spec.sites.values():
        if site.part:
            place = whole[site.path]
            found[site.name] = Place(place.group, site, place.out0 + site.offset)
    return MappingProxyType(found)


def _of_decoder(name: str, spec: BackboneSpec) -> bool:
    if spec.kind != "encoder-decoder":
        return False
    return name == "head" or (name.startswith("decoder.") and not name.endswith((".cross.k", ".cross.v")))


def _fused_with(name: str, spec: BackboneSpec) -> tuple[Site, ...]:
    stem, _, leaf = name.rpartition(".")
    for block, leaves in FUSED:
        if stem.endswith(f".{block}") and leaf == leaves[0]:
            members = [spec.sites.get(f"{stem}.{other}") for other in leaves]
            found = tuple(member for member in members if member is not None and not member.part)
            if len(found) == len(leaves):
                return found
    return (spec.sites[name],)
