"""One adapter's files, of whatever kind, as components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.adapterhub import bottleneck, lora, prefix
from deltas.formats.adapterhub.keys import Keys
from deltas.formats.adapterhub.names import CONFIG, PICKLED, WEIGHTS, one_of_two
from deltas.formats.adapterhub.options import TOP_KEYS
from deltas.formats.adapterhub.places import prefix as known_family
from deltas.formats.files import DeltaFiles
from deltas.formats.header import shown
from deltas.formats.plan import PlannedComponent, check_config
from deltas.sites import BackboneSpec

_Reader = Callable[[Mapping[str, Any], Keys, str], PlannedComponent]
_READERS: Mapping[str, _Reader] = {
    "lora": lora.component,
    "mtl_lora": lora.component,
    "prefix_tuning": prefix.component,
    "prompt_tuning": prefix.prompt,
}
_REASONS = {
    "reft": "ReFT changes the first and last tokens of a text, whose end is not known while it is being made",
}


def opened(
    files: DeltaFiles, spec: BackboneSpec, folder: str = ""
) -> tuple[Mapping[str, Any], Mapping[str, Any], Keys]:
    """An adapter's outer and inner configuration and its tensors' names; ``folder`` is empty or ends in a slash.

    Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`.
    """
    where = folder + CONFIG
    outer = files.json(where)
    check_config(outer, TOP_KEYS, where)
    known_family(spec)
    if outer.get("model_type") != spec.family:
        raise UnsupportedDelta(
            f"model_type is {shown(outer.get('model_type'))}, the backbone is {spec.family}",
            field="model_type",
        )
    if outer.get("hidden_size") != spec.hidden:
        raise InvalidDelta(
            f"hidden_size is {shown(outer.get('hidden_size'))}, the backbone's is {spec.hidden}",
            field="hidden_size",
        )
    inner = outer.get("config")
    if not isinstance(inner, dict):
        raise InvalidDelta("config must be an object", field="config")
    keys = Keys.of(files, one_of_two(files, folder, WEIGHTS, PICKLED), outer, spec)
    return outer, inner, keys


def components(inner: Mapping[str, Any], keys: Keys, where: str) -> Iterator[PlannedComponent]:
    """What the configuration and the tensors amount to, in order. Raises as :func:`opened` does."""
    kind = inner.get("architecture")
    if kind == "union":
        yield from _union(inner, keys, where)
    elif kind is None:
        yield from bottleneck.components(inner, keys, where)
    elif isinstance(kind, str) and kind in _READERS:
        yield _READERS[kind](inner, keys, where)
    else:
        served = ", ".join(["bottleneck adapters (no architecture)", "union", *_READERS])
        reason = _REASONS.get(kind, "not known") if isinstance(kind, str) else "not a name"
        raise UnsupportedDelta(
            f"AdapterHub's {shown(kind)} is not served: {reason}; served: {served}", field="architecture"
        )


def _union(inner: Mapping[str, Any], keys: Keys, where: str) -> Iterator[PlannedComponent]:
    """Several configurations of one adapter. What versions changed, the library corrects outside of unions only."""
    unknown = sorted(set(inner) - {"architecture", "configs"})
    if unknown:
        raise UnsupportedDelta(f"{where}: unknown key {shown(unknown[0])}", field=unknown[0])
    configs = inner.get("configs")
    if not isinstance(configs, list) or not configs or not all(isinstance(c, dict) for c in configs):
        raise InvalidDelta("configs must be a list of objects", field="configs")
    plain = Keys(keys.header, keys.file, keys.name, keys.spec, None, versioned=True, inside=keys.inside)
    plain.repeats = keys.repeats
    for j, config in enumerate(configs):
        if config.get("architecture") == "union":
            raise UnsupportedDelta("a union in a union", field="architecture")
        yield from components(config, plain, f"{where} {j}")
