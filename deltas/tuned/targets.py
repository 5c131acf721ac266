"""From what a job names to sites: canonical names, parts of them, the modules' own names, and words for many sites.

The words are ``linears`` (or PEFT's ``all-linear``), ``norms`` and ``biases`` (linears and norms that have a bias in the
backbone): all of that kind inside the backbone's layers, fused linears whole, and the norms outside the layers too. None
includes the output head, or the layers of an encoder's own task that are not run for another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.sites import BackboneSpec, Site, SiteKind

WORDS = ("linears", "all-linear", "norms", "biases")


def chosen(
    targets: Sequence[str], spec: BackboneSpec, kinds: tuple[SiteKind, ...], method: str
) -> list[Site]:
    """The sites of these kinds that the targets name, each once, in forward order.

    A target is, in this order: a word; a site's whole name; the end of sites' names or module paths (``q``, ``attn.q``,
    ``q_proj``, ``query``); a part within sites' names (``mlp``, ``layers.3``). Raises ``InvalidDelta`` with field
    ``targets`` for one that names nothing here, ``UnsupportedDelta`` where nothing that it names can be changed.
    """
    if isinstance(targets, str) or not targets or not all(isinstance(target, str) for target in targets):
        raise InvalidDelta("targets must be a list of one or more names of modules or sites", field="targets")
    found: set[str] = set()
    for target in targets:
        sites = [site for site in _named(target, spec) if site.kind in kinds]
        if not sites:
            wanted = " or ".join(kinds)
            raise InvalidDelta(
                f"targets: {ascii(target)[:200]} names no {wanted} site of this backbone, which {method} needs; "
                f"for example {_examples(spec, kinds)}",
                field="targets",
            )
        free = [site for site in sites if not site.refused]
        if not free:
            raise UnsupportedDelta(f"targets: {sites[0].name}: {sites[0].refused}", field="targets")
        found |= {site.name for site in free}
    return [site for site in spec.sites.values() if site.name in found]


def leaves(spec: BackboneSpec, *names: str) -> list[Site]:
    """The sites inside layers whose name ends so (``q``, ``attn.kv``), in forward order; none that is refused."""
    return [
        site
        for site in spec.sites.values()
        if "layers." in site.name and not site.refused and any(site.name.endswith(f".{n}") for n in names)
    ]


def before_head(spec: BackboneSpec) -> BackboneSpec:
    """The spec with the sites only that a row goes through to a task head: none of the backbone's own output head, and of
    an encoder-decoder the encoder's alone. For the targets of jobs that classify, regress or tag."""
    stack = "encoder." if spec.kind == "encoder-decoder" else ""
    sites = {n: site for n, site in spec.sites.items() if n.startswith(stack) and not _of_head(site)}
    return replace(spec, sites=sites)


def word(name: str, spec: BackboneSpec) -> list[Site]:
    """The sites that one of WORDS stands for."""
    whole = [
        site
        for site in spec.of_kind(SiteKind.LINEAR, SiteKind.NORM)
        if not site.part and not site.refused and not _of_head(site)
    ]
    if name == "norms":
        return [site for site in whole if site.kind is SiteKind.NORM]
    if name == "biases":
        return [site for site in whole if site.bias]
    return [site for site in whole if site.kind is SiteKind.LINEAR]


def _of_head(site: Site) -> bool:
    return site.name == "head" or site.name.startswith("head.")


def _named(target: str, spec: BackboneSpec) -> Iterable[Site]:
    if target in WORDS:
        return word(target, spec)
    if target in spec.sites:
        return [spec.sites[target]]
    ends = [
        site
        for site in spec.sites.values()
        if site.name.endswith(f".{target}")
        or (not site.part and (site.path == target or site.path.endswith(f".{target}")))
    ]
    return ends or [site for site in spec.sites.values() if f".{target}." in f".{site.name}."]


def _examples(spec: BackboneSpec, kinds: tuple[SiteKind, ...]) -> str:
    last = {site.name.split(".", 2)[-1]: site.name for site in spec.of_kind(*kinds) if not site.refused}
    return ", ".join(list(last.values())[:3]) or "none: it cannot be trained on this backbone"
