"""One upload as its reader goes through it: the config, the header's names, and which of them have found a meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import listed
from deltas.formats.header import Header, shown
from deltas.formats.plan import PlannedComponent
from deltas.formats.sources import Derived, Source
from deltas.methods.per_site import whole
from deltas.sites import BackboneSpec, Site, SiteKind

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
SHARED = "base_model."


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A module that PEFT wrapped: its path as the file has it, its site, its tensors by canonical parameter."""

    path: str
    site: Site
    keys: Mapping[str, str]


@dataclass
class Reading:
    """What is known, and what has been found so far. ``left`` are the names that nothing has claimed yet, in order."""

    config: Mapping[str, Any]
    header: Header
    file: str
    spec: BackboneSpec
    left: dict[str, None] = field(init=False)
    components: list[PlannedComponent] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, str] = field(default_factory=dict)
    spare: set[str] = field(default_factory=set)
    tuned: set[str] = field(default_factory=set)  # the sites of the modules that PEFT wrapped

    def __post_init__(self) -> None:
        self.left = dict.fromkeys(self.header.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.header.tensors[key].shape

    def claim(self, key: str) -> str:
        """Take a name out of what is left."""
        del self.left[key]
        return key

    def site(self, key: str, path: str) -> Site | None:
        """The site of a module. Refuses an encoder-decoder's ``shared``, a change of which changes nothing in PEFT."""
        site = self.spec.site_at(path)
        if site is not None and site.name == "embed" and site.refused:
            raise UnsupportedDelta(
                f"{shown(key)}: {self.spec.family.upper()} never calls 'shared', so PEFT's change of it changes "
                "nothing; train 'embed_tokens'",
                field=key,
            )
        return site

    def stored(self, site: Site, parameter: str, key: str) -> Source:
        """A module's own parameter under that name of the file: GPT-2 stores its linears' weights ``[in, out]``."""
        turned = self.spec.conv1d and site.kind is SiteKind.LINEAR and site.name != "head"
        return Derived(key, transposed=True) if turned and parameter == "weight" else key

    def wrapped(
        self, parameters: Mapping[str, str], kinds: Iterable[SiteKind] = tuple(SiteKind)
    ) -> list[Wrapped]:
        """Claim ``base_model.model.<path>.<suffix>``, for every suffix of ``parameters`` (-> canonical name), by module.

        In the order of the backbone's sites. Names whose module has no site of one of ``kinds`` are left.
        """
        found: dict[str, tuple[str, Site, dict[str, str]]] = {}
        wanted = tuple(kinds)
        for key in list(self.left):
            split = split_key(key, parameters)
            site = self.site(key, split[0]) if split else None
            if split is None or site is None or site.kind not in wanted:
                continue
            path, suffix = split
            _, _, keys = found.setdefault(site.name, (path, site, {}))
            if parameters[suffix] in keys:
                raise InvalidDelta(
                    f"{listed([keys[parameters[suffix]], key])} are the same tensor of the same module",
                    field=key,
                )
            keys[parameters[suffix]] = self.claim(key)
            self.tuned.add(site.name)
        return [
            Wrapped(found[name][0], found[name][1], found[name][2])
            for name in self.spec.sites
            if name in found
        ]

    def shared(self, name: str) -> str | None:
        """Claim ``base_model.<name>``, a tensor of the whole model, if it is there."""
        key = SHARED + name
        return self.claim(key) if key in self.left else None

    def demand(self, modules: Iterable[Wrapped], parameters: Mapping[str, str]) -> None:
        """Every module must have every one of ``parameters``, and there must be some module."""
        every = list(modules)
        suffixes = {canonical: suffix for suffix, canonical in parameters.items()}
        missing = [
            f"{PREFIX}{module.path}.{suffix}"
            for module in every
            for canonical, suffix in suffixes.items()
            if canonical not in module.keys
        ]
        if missing:
            raise InvalidDelta(f"{self.file}: missing tensors: {listed(missing)}", field=missing[0])
        if not every:
            self.refuse_left()
            kind = self.config.get("peft_type")
            raise InvalidDelta(f"{self.file} holds no {kind} tensors", field=self.file)

    def hold(self, keys: Iterable[str], dimension: int, field: str, default: int, times: int = 1) -> None:
        """Refuse tensors of another size than the config's ``field`` says, as PEFT does when it loads them."""
        wanted = whole(self.config.get(field, default), field, 1)
        for key in keys:
            shape = self.shape(key)
            if len(shape) <= dimension or shape[dimension] != wanted * times:
                raise InvalidDelta(
                    f"{shown(key)} has shape {list(shape)}, but {field} is {wanted}", field=field
                )

    def refuse_left(self) -> None:
        """Refuse names that have no meaning: serving the delta without them would not be serving it."""
        if self.left:
            raise InvalidDelta(
                f"{self.file}: {len(self.left)} tensors mean nothing here: {listed(sorted(self.left))}",
                field=min(self.left),
            )

    def add(self, method: str, config: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
        """One component more."""
        self.components.append(PlannedComponent(method, config, dict(sources)))


def split_key(key: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """``base_model.model.<path>.<suffix>`` -> path and suffix, the longest of ``suffixes`` that fits; None for another."""
    if not key.startswith(PREFIX):
        return None
    fitting = [suffix for suffix in suffixes if key.endswith(f".{suffix}")]
    if not fitting:
        return None
    suffix = max(fitting, key=len)
    path = key[len(PREFIX) : -len(suffix) - 1]
    return (path, suffix) if path else None


def sources(modules: Iterable[Wrapped]) -> dict[str, Any]:
    """``<site>/<parameter>`` -> the file's name, of every tensor."""
    return {f"{module.site.name}/{name}": key for module in modules for name, key in module.keys.items()}
