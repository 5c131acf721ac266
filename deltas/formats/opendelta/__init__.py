"""OpenDelta's files: ``config.json``, ``pytorch_model.bin``: the backbone's state dict, cut to what was trained.

So a key says where a tensor was: behind which module a delta stands, or which of the backbone's own parameters has
another value. The config's ``modified_modules`` must agree: what it does not name, OpenDelta drops when it loads; what
it names and the file lacks, OpenDelta leaves random. Its ``pytorch_model.bin`` may be sent as ``model.safetensors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import DeltaFiles, listed
from deltas.formats.header import Header, shown
from deltas.formats.opendelta import adapters, heads, placing, prefixes
from deltas.formats.opendelta.config import CONFIG, checked
from deltas.formats.opendelta.keys import Keys, sort
from deltas.formats.opendelta.modules import Module, modules
from deltas.formats.opendelta.names import Names
from deltas.formats.plan import Plan, PlannedComponent, provenance
from deltas.formats.sources import Derived, Source
from deltas.methods.base import number
from deltas.sites import BackboneSpec, SiteKind

PICKLED = "pytorch_model.bin"
WEIGHTS = "model.safetensors"
HEAD, EMBED = "head", "embed"


def plan(files: DeltaFiles, spec: BackboneSpec) -> Plan:
    """What to load. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the key or tensor."""
    config = files.json(CONFIG)
    kind, options = checked(config)
    if WEIGHTS in files and PICKLED in files:
        raise InvalidDelta(f"send {PICKLED} or {WEIGHTS}, not both", field=WEIGHTS)
    weights = WEIGHTS if WEIGHTS in files else PICKLED
    header = files.header(weights)
    known = modules(spec)
    head = heads.component(config, spec.family, header.tensors.keys(), header)
    taken = set() if head is None else set(head.sources.values())
    keys = sort(kind, [name for name in header.tensors if name not in taken], known, spec, weights)
    if not header.tensors:
        raise InvalidDelta(f"{weights} holds no tensors: OpenDelta found nothing to train", field=weights)
    components = [*_delta(kind, options, config, keys, known, header, spec), *_own(keys, spec)]
    components += [] if head is None else [head]
    return Plan(
        "opendelta",
        weights,
        tuple(components),
        provenance(config, ("backbone_checkpoint_name", "backbone_class", "opendelta_version")),
    )


def _delta(
    kind: str,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    keys: Keys,
    known: Mapping[str, Module],
    header: Header,
    spec: BackboneSpec,
) -> Iterator[PlannedComponent]:
    """The components of the delta's own modules; none where only the backbone's parameters were trained."""
    if kind == "soft_prompt":
        yield _soft_prompt(options, keys, header, spec)
        return
    names = Names.of(config, spec)
    if not keys.parts and not any(names.mean(module) for module in known.values()):
        return  # the names mean nothing here, and only the backbone's own parameters were trained
    if kind == "prefix":
        yield prefixes.component(options, keys.parts, known, names, header, spec)
        return
    _check_named(kind, keys, known, names)
    match kind:
        case "lora":
            yield _lora(options, keys, header, spec)
        case "adapter" | "parallel_adapter" | "compacter" | "low_rank_adapter":
            adapters.check_shapes(kind, options, spec.hidden, keys.parts, header)
            standings = (
                placing.parallel(keys.parts, known, names, spec)
                if kind == "parallel_adapter"
                else placing.sequential(keys.parts, known, spec)
            )
            yield from adapters.components(kind, options, standings, keys.parts)
        case "bitfit" if keys.parts:
            yield _added_biases(keys, spec)
        case _:
            pass


def _check_named(kind: str, keys: Keys, known: Mapping[str, Module], names: Names) -> None:
    """The config's names and the tensors must mean the same modules."""
    unknown = [path for path in keys.parts if path not in known]
    if unknown:
        raise UnsupportedDelta(
            f"a {kind} at {listed(sorted(unknown))} is not served: no site is known for it",
            field=min(unknown),
        )
    if kind == "parallel_adapter" or not names.certain:
        return
    unnamed = [path for path in keys.parts if not names.mean(known[path])]
    if unnamed:
        raise InvalidDelta(
            f"there are tensors for {listed(sorted(unnamed))}, which modified_modules does not name; OpenDelta "
            "itself would drop them",
            field="modified_modules",
        )
    if kind == "bitfit":
        return  # a bias that the backbone has is saved as that
    missing = [path for path, module in known.items() if path not in keys.parts and names.mean(module)]
    if missing:
        raise InvalidDelta(
            f"modified_modules names {listed(sorted(missing))}, for which there are no tensors",
            field="modified_modules",
        )


def _lora(options: Mapping[str, Any], keys: Keys, header: Header, spec: BackboneSpec) -> PlannedComponent:
    rank, scale = options["lora_r"], number(options["lora_alpha"], "lora_alpha") / options["lora_r"]
    sources: dict[str, str] = {}
    for path, tensors in keys.parts.items():
        site = spec.site_at(path)
        if site is None or site.kind is not SiteKind.LINEAR:
            raise InvalidDelta(f"a lora at {shown(path)}, which is no linear", field=path)
        for tensor, key in tensors.items():
            sources[f"{site.name}/{tensor[-1]}"] = key
            shape = header.tensors[key].shape
            if tensor.endswith("A") and shape[:1] != (rank,):
                raise InvalidDelta(
                    f"{shown(key)} has shape {list(shape)}, but lora_r is {rank}", field="lora_r"
                )
    return PlannedComponent("lora", {"scale": scale}, sources)


def _added_biases(keys: Keys, spec: BackboneSpec) -> PlannedComponent:
    """Biases that OpenDelta put behind modules that it did not take for linears or layer norms."""
    sources: dict[str, str] = {}
    for path, tensors in keys.parts.items():
        site = spec.site_at(path)
        if site is None:
            raise UnsupportedDelta(f"a bias behind {shown(path)} is not served", field=path)
        sources |= {f"{site.name}/beta": key for key in tensors.values()}
    return PlannedComponent("bitfit", {}, sources)


def _soft_prompt(
    options: Mapping[str, Any], keys: Keys, header: Header, spec: BackboneSpec
) -> PlannedComponent:
    embed = spec.sites.get("encoder.embed")
    path = "" if embed is None else embed.path.rpartition(".")[0]
    if embed is not None and embed.scale != 1.0:
        raise UnsupportedDelta(
            "behind a soft prompt the library leaves the tokens' embeddings as they are, without the backbone's "
            f"factor of {embed.scale:g}",
            field="delta_type",
        )
    if set(keys.parts) != {path}:
        place = f"{path}.soft_prompt_layer" if path else "soft_prompt_layer"
        raise InvalidDelta(f"a soft prompt must be at {place}", field=place)
    (key,) = keys.parts[path].values()
    shape = header.tensors[key].shape
    if shape[:1] != (options["soft_token_num"],):
        raise InvalidDelta(
            f"{shown(key)} has shape {list(shape)}, but soft_token_num is {options['soft_token_num']}",
            field="soft_token_num",
        )
    return PlannedComponent("prompt", {}, {"embeddings": key})


def _own(keys: Keys, spec: BackboneSpec) -> Iterator[PlannedComponent]:
    """The backbone's own parameters, with the values that training gave them; a tied embedding is in several places."""
    sources: dict[str, Source] = {}
    for key, (site, parameter) in keys.own.items():
        turned = spec.conv1d and site.kind is SiteKind.LINEAR and site.name != HEAD and parameter == "weight"
        names = _tied(site.name, spec) if parameter == "weight" else [site.name]
        for name in names:
            sources[f"{name}/{parameter}"] = (
                Derived(key, transposed=turned) if turned or len(names) > 1 else key
            )
    if sources:
        yield PlannedComponent("override", {}, sources)


def _tied(name: str, spec: BackboneSpec) -> list[str]:
    """The sites whose weight is this site's: those of the token embedding and, if tied, of the head."""
    embeddings = [site for site in spec.of_kind(SiteKind.EMBEDDING) if site.name.rpartition(".")[2] == EMBED]
    together = [site.name for site in embeddings] + ([HEAD] if spec.tied else [])
    return [n for n in together if not spec.sites[n].refused] if name in together else [name]


__all__ = ["CONFIG", "PICKLED", "WEIGHTS", "plan"]
