"""Where OpenDelta's adapters stand: sequential ones behind a module's output, parallel ones across two modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import listed
from deltas.formats.header import shown
from deltas.formats.opendelta.modules import Module, Reach
from deltas.formats.opendelta.names import Names
from deltas.patches import BlockInput
from deltas.sites import BackboneSpec, SiteKind


@dataclass(frozen=True, slots=True)
class Standing:
    """One adapter: its module's path in the file's keys, and the site and input that give the same."""

    path: str
    at: Reach


def sequential(paths: Iterable[str], known: Mapping[str, Module], spec: BackboneSpec) -> list[Standing]:
    """Adapters that read a module's output and add to it. Raises :class:`UnsupportedDelta`, naming the module."""
    found: list[Standing] = []
    ends = {site.norm for site in spec.of_kind(SiteKind.BLOCK)}
    for path in paths:
        output = known[path].output
        site = None if output is None else spec.sites[output.site]
        if output is None or site is None or not (site.kind is SiteKind.BLOCK or site.path in ends):
            raise UnsupportedDelta(
                f"an adapter behind {shown(path)} is not served; it may stand behind a sublayer, the last linear of "
                "one, or the norm that follows one",
                field=path,
            )
        found.append(Standing(path, output))
    return found


def parallel(
    paths: Iterable[str], known: Mapping[str, Module], names: Names, spec: BackboneSpec
) -> list[Standing]:
    """Adapters that read the input of one module and add to the output of another, or of the same.

    OpenDelta pairs modules as it meets them: its n-th match reads if n is even, and what reads also writes where the
    n-th name, counted round, is the next one too. Raises :class:`UnsupportedDelta` for pairs across sublayers.
    """
    if not names.certain:
        raise UnsupportedDelta(
            "modified_modules has a regular expression that is not read, and a parallel adapter's pairs depend on "
            "it; use module names",
            field="modified_modules",
        )
    unmet = names.unmet(known.values())
    if unmet:
        raise UnsupportedDelta(
            f"modified_modules names {listed(unmet)}, which no known module of this backbone ends with",
            field="modified_modules",
        )
    pairs = dict(_pairs([module for module in known.values() if names.mean(module)], names.order))
    found: list[Standing] = []
    for path in paths:
        if path not in pairs:
            raise InvalidDelta(
                f"there is an adapter at {shown(path)}, where modified_modules puts none",
                field="modified_modules",
            )
        found.append(Standing(path, _across(known[path], pairs[path], spec)))
    return found


def _pairs(modules: Iterable[Module], names: tuple[str, ...]) -> Iterator[tuple[str, Module]]:
    """Path of the module that is read -> the module whose output is added to."""
    reader = ""
    turn = 0
    for module in modules:
        if turn % 2 == 0:
            reader = module.path
        if turn % 2 == 1 or (turn + 1 < len(names) and names[turn] == names[turn + 1]):
            yield reader, module
            turn |= 1
        turn = (turn + 1) % len(names)


def _across(reader: Module, writer: Module, spec: BackboneSpec) -> Reach:
    given, output = reader.input, writer.output
    if given is not None and output is not None:
        block = spec.sites[given.site]
        if output.site == block.name:
            return given
        norm = spec.sites[output.site]
        # behind the norm of a post-norm backbone: only what the sublayer read is still known there
        if norm.kind is SiteKind.NORM and norm.path == block.norm:
            return Reach(norm.name, BlockInput.INNER)
    raise UnsupportedDelta(
        f"a parallel adapter from {shown(reader.path)} to {shown(writer.path)} is not served; it must read what a "
        "sublayer reads and add to what that sublayer gives",
        field="modified_modules",
    )


def layers_of(standings: Iterable[Standing]) -> Iterator[tuple[BlockInput, list[Standing]]]:
    """The adapters as components: at each site those of inner modules first, one a component.

    Adapters of one component read the same thing and are at different sites.
    """
    by_site: dict[str, list[Standing]] = {}
    for standing in standings:
        by_site.setdefault(standing.at.site, []).append(standing)
    depth = max((len(found) for found in by_site.values()), default=0)
    for level in range(depth):
        here = [
            sorted(found, key=lambda standing: -len(standing.path))[level]
            for found in by_site.values()
            if level < len(found)
        ]
        for reads in BlockInput:
            group = [standing for standing in here if standing.at.reads is reads]
            if group:
                yield reads, group
