"""What a PEFT folder holds, and what the writers of its types share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.weights import SiteWeights

PREFIX = "base_model.model."  # of a wrapped model's modules
SHARED = "base_model."  # of a type's tensors that are no module's, and of the model beside a prompt

# Modules that are no site may be called so too (BERT's pooler, RoBERTa's classifier), hence no target on its own.
_VAGUE = frozenset({"dense"})


@dataclass(frozen=True)
class Form:
    """One PEFT type's share of a folder: its config's own keys, and tensors by PEFT's names.

    ``modules`` are the paths of the modules that PEFT wraps; None for prompts, which wrap none.
    """

    peft_type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    modules: tuple[str, ...] | None = None


Number = TypeVar("Number", int, float)

Writer = Callable[[Component, SiteWeights], Form]
"""A component as PEFT has it. Raises :class:`UnsupportedDelta` where PEFT has no such thing."""


@dataclass
class Modules:
    """Tensors of wrapped modules, collected by path."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)

    def add(self, path: str, parameters: Mapping[str, Tensor]) -> None:
        """``parameters`` are by PEFT's names within the module, as ``lora_A.weight``."""
        self.paths.append(path)
        for name, tensor in parameters.items():
            self.tensors[f"{PREFIX}{path}.{name}"] = tensor

    def form(self, peft_type: str, config: Mapping[str, Any]) -> Form:
        return Form(peft_type, config, self.tensors, tuple(self.paths))


@dataclass(frozen=True, eq=False)
class Here:
    """One site of a component that is written, and its tensors."""

    site: Site
    tensors: Mapping[str, Tensor]

    @property
    def path(self) -> str:
        """Of the module. Raises where the site is a part of a fused linear, which PEFT cannot name."""
        if self.site.part:
            raise UnsupportedDelta(
                f"{self.site.name} is a part of {self.site.path}, and PEFT changes whole modules",
                field=self.site.name,
            )
        return self.site.path

    def size(self, parameter: str, dimension: int = 0) -> int:
        return self.tensors[parameter].shape[dimension]


def sites_of(component: Component, spec: BackboneSpec) -> list[Here]:
    """The component's sites in the order in which PEFT meets their modules."""
    present = spec.in_module_order(spec.sites[name] for name in component.sites())
    return [Here(site, component.at(site.name)) for site in present]


def alike(values: Iterable[Any], what: str) -> Any:
    """The one value that all sites have. Raises where PEFT's config, which has one for all, cannot say theirs."""
    found = list(values)
    if any(value != found[0] for value in found):
        raise UnsupportedDelta(f"its sites differ in {what}, for which PEFT has one value")
    return found[0]


def scale_of(component: Component, here: Here) -> float:
    """The scale of one site."""
    return float(component.config.get("scales", {}).get(here.site.name, component.config["scale"]))


def linears_only(sites: Iterable[Here], spec: BackboneSpec, peft_type: str) -> None:
    """Refuse what PEFT has for ``torch.nn.Linear`` only."""
    for here in sites:
        site = here.site
        if site.kind is SiteKind.LINEAR and spec.conv1d and site.name != "head":
            raise UnsupportedDelta(
                f"PEFT has {peft_type} for torch.nn.Linear only, and {site.path} is a Conv1D", field=site.name
            )


def targets(paths: Iterable[str], spec: BackboneSpec, *, others: Iterable[str] = ()) -> list[str]:
    """Short names that mean these modules and no others, as PEFT matches them: whole or as a dotted suffix.

    None of the ``others`` ends with one of these names, dotted or not.
    """
    wanted, apart = set(paths), tuple(others)
    known = {site.path for site in spec.sites.values()} | wanted
    return sorted({_shortest(path, wanted, known, apart) for path in wanted})


def _shortest(path: str, wanted: set[str], known: set[str], apart: Iterable[str]) -> str:
    parts = path.split(".")
    for count in range(1, len(parts)):
        suffix = ".".join(parts[-count:])
        named = {other for other in known if other == suffix or other.endswith(f".{suffix}")}
        if suffix not in _VAGUE and named <= wanted and not any(other.endswith(suffix) for other in apart):
            return suffix
    return path


def commonest(values: Iterable[Number]) -> Number:
    """The value that most modules have: a config's default, the others being its exceptions."""
    return Counter(values).most_common(1)[0][0]


def patterns(values: Mapping[str, Number], default: Number, spec: BackboneSpec) -> dict[str, float]:
    """A ``*_pattern`` that gives each path its value where that is not the default."""
    found: dict[str, float] = {}
    for value in sorted(set(values.values()) - {default}):
        for name in targets([path for path, other in values.items() if other == value], spec):
            found[name] = plain(value)
    return found


def plain(value: float) -> float:
    """A number as people write it: an integer where it is one, but for rounding."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-12 * max(1.0, abs(value)) else value
