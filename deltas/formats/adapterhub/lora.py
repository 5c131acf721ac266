"""AdapterHub's LoRA and what it builds on it: gated LoRA, DoRA, VeRA, MTL-LoRA and (IA)3.

LoRA: ``y += a/r B (A x)``, a gate taking the place of a/r. DoRA: ``y = m/|W + B A| (W x + b + a/r B A x)``, bias inside and
norms without a/r. (IA)3 scales a linear's output, not its input. GPT-2's fused layer stores q, k and v one after another
for those of them that have a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.adapterhub import places
from deltas.formats.adapterhub.keys import Keys
from deltas.formats.adapterhub.options import (
    LORA_DEFAULTS,
    LORA_KEYS,
    Config,
    attention_matrices,
    left_out,
    lora_scale,
    old_scaling,
    positive,
)
from deltas.formats.adapterhub.places import Place
from deltas.formats.header import shown
from deltas.formats.plan import PlannedComponent, check_config
from deltas.formats.sources import Derived, Source
from deltas.methods import gates
from deltas.methods.base import number


def component(config: Mapping[str, Any], keys: Keys, where: str) -> PlannedComponent:
    """One LoRA configuration. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`."""
    check_config(config, LORA_KEYS, where)
    options = {**LORA_DEFAULTS, **config}
    targets = list(_targets(options, keys))
    if not targets:
        raise InvalidDelta("the config places no adapter in any layer", field="config")
    if options["use_gating"]:
        for place, _ in targets:
            gates.check_gate(place.site, keys.spec, "use_gating")
    if options["composition_mode"] == "scale":
        return _ia3(options, keys, targets)
    # the library looks at the type: a whole number does not make it VeRA
    vera = isinstance(options["vera_d"], float) or isinstance(options["vera_b"], float)
    special = "vera_d" if vera else "use_dora" if options["use_dora"] else None
    if options.get("architecture") == "mtl_lora":
        special = "architecture"
    fused = [place.module for place, part in targets if part is not None]
    if special is not None and (fused or options["use_gating"]):
        raise UnsupportedDelta(
            f"{special}: the library's fused q, k, v layer has plain LoRA and (IA)3 only"
            if fused
            else f"{special}: not served with a gate",
            field=special,
        )
    if vera:
        return _vera(options, keys, targets)
    if special == "architecture":
        return _multi_task(options, keys, targets)
    return _plain(options, keys, targets)


def _targets(config: Config, keys: Keys) -> Iterator[tuple[Place, tuple[int, int] | None]]:
    """Every linear with a change; for a part of a fused one also which of how many parts it is in the file."""
    skipped, matrices = left_out(config), attention_matrices(config)
    fused = keys.spec.family == "gpt2"
    if config["selfattn_lora"]:
        for at, matrix in enumerate(matrices):
            for place in places.attention_linears(matrix, keys.spec):
                if place.layer not in skipped:
                    yield place, (at, len(matrices)) if fused else None
    for location in ("intermediate_lora", "output_lora"):
        if config[location]:
            for place in places.feed_forward_linears(location, keys.spec):
                if place.layer not in skipped:
                    yield place, None


Targets = list[tuple[Place, tuple[int, int] | None]]


def _part(keys: Keys, path: str, part: tuple[int, int] | None, **changes: Any) -> Source:
    """A tensor, or the rows of one part of a fused layer."""
    key = keys.key(path)
    if part is None:
        return Derived(key, **changes) if changes else key
    shape = keys.shape(path)
    at, count = part
    if not shape or shape[0] % count:
        raise InvalidDelta(
            f"{shown(key)} has shape {list(shape)}, which {count} parts cannot share", field=key
        )
    rows = shape[0] // count
    return Derived(key, rows=(at * rows, (at + 1) * rows), **changes)


def _plain(config: Config, keys: Keys, targets: Targets) -> PlannedComponent:
    sources: dict[str, Source] = {}
    rank = positive(config, "r")
    for place, part in targets:
        stem = f"{place.module}.loras.{keys.name}"
        wanted = rank * (1 if part is None else part[1])
        shape = keys.shape(f"{stem}.lora_A")
        if not shape or shape[0] != wanted:
            raise InvalidDelta(
                f"{shown(keys.key(f'{stem}.lora_A'))} has shape {list(shape)}, but r is {rank}", field="r"
            )
        sources[f"{place.site}/A"] = _part(keys, f"{stem}.lora_A", part)
        sources[f"{place.site}/B"] = _part(keys, f"{stem}.lora_B", part)
        if config["use_gating"]:
            sources |= _gate(keys, stem, place.site)
        if config["use_dora"]:
            sources[f"{place.site}/magnitude"] = _flat(keys, f"{stem}.m.weight")
    if config["use_gating"]:
        return PlannedComponent("gated_lora", {}, sources)
    dora = {"dora": "adapterhub"} if config["use_dora"] else {}
    return PlannedComponent("lora", {"scale": lora_scale(config, keys.version), **dora}, sources)


def _ia3(config: Config, keys: Keys, targets: Targets) -> PlannedComponent:
    if config["use_dora"] or config["r"] != 1:
        raise InvalidDelta("composition_mode 'scale' has r 1 and no DoRA", field="composition_mode")
    scale = 1.0 if old_scaling(keys.version) else number(config["alpha"], "alpha")
    if any(part is not None for _, part in targets) and scale != 1.0:
        raise UnsupportedDelta(
            "the library scales all of a fused q, k, v layer by alpha, also what has no vector: use alpha 1",
            field="alpha",
        )
    sources: dict[str, Source] = {}
    for place, part in targets:
        stem = f"{place.module}.loras.{keys.name}"
        sources[f"{place.site}/gain"] = _part(keys, f"{stem}.lora_B", part, shape=(-1,))
        if config["use_gating"]:
            sources |= _gate(keys, stem, place.site)
    if config["use_gating"]:
        return PlannedComponent("gated_ia3", {}, sources)
    return PlannedComponent("ia3", {"scale": scale}, sources)


def _vera(config: Config, keys: Keys, targets: Targets) -> PlannedComponent:
    stem = f"shared_parameters.{keys.name}"
    sources: dict[str, Source] = {"A": keys.key(f"{stem}.lora_A"), "B": keys.key(f"{stem}.lora_B")}
    for place, _ in targets:
        own = f"{place.module}.loras.{keys.name}"
        sources[f"{place.site}/V"] = keys.key(f"{own}.vera_B")
        sources[f"{place.site}/U"] = keys.key(f"{own}.vera_D")
        if config["use_dora"]:
            sources[f"{place.site}/magnitude"] = _flat(keys, f"{own}.m.weight")
    return PlannedComponent("dense_vera", {"scale": lora_scale(config, keys.version)}, sources)


def _multi_task(config: Config, keys: Keys, targets: Targets) -> PlannedComponent:
    sources: dict[str, Source] = {}
    for place, _ in targets:
        own = f"{place.module}.loras.{keys.name}"
        names = {"A": "lora_A", "B": "lora_B", "values": "task_specific.values", "weights": "weights"}
        for ours, theirs in names.items():
            sources[f"{place.site}/{ours}"] = keys.key(f"{own}.{theirs}")
    # not corrected by the library where it corrects an old LoRA: there was no MTL-LoRA then
    canonical = {"scale": lora_scale(config, None), "sharpness": config["weights_sharpness"]}
    return PlannedComponent("mtl_lora", canonical, sources)


def _gate(keys: Keys, stem: str, site: str) -> dict[str, Source]:
    return {
        f"{site}/gate": keys.key(f"{stem}.gate.weight"),
        f"{site}/gate_bias": keys.key(f"{stem}.gate.bias"),
    }


def _flat(keys: Keys, path: str) -> Source:
    return Derived(keys.key(path), shape=(-1,))
