"""PEFT's files: ``adapter_config.json``, ``adapter_model.safetensors``. Read so far: LORA, PROMPT_TUNING.

The tensors say where a LoRA applies; ``target_modules`` is only compared with them. Every key of the
library's configuration classes has an entry below: None for what changes nothing in evaluation, else a check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import DeltaFiles, listed
from deltas.formats.header import Header, shown
from deltas.formats.patterns import Patterns
from deltas.formats.plan import (
    Check,
    Plan,
    PlannedComponent,
    absent,
    check_config,
    one_of,
    printable,
    provenance,
    refuse_unknown,
)
from deltas.methods.base import number
from deltas.sites import BackboneSpec, SiteKind

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_TARGETS_MAX = 65_536
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_PROMPT_KEY = "prompt_embeddings"

_COMMON: dict[str, Check | None] = {
    "peft_type": None,
    "auto_mapping": None,
    "peft_version": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": None,
    "modules_to_save": absent,
}

LORA_KEYS: Mapping[str, Check | None] = _COMMON | {
    # Read below.
    "r": None,
    "lora_alpha": None,
    "use_rslora": one_of(True, False),
    "rank_pattern": None,
    "alpha_pattern": None,
    "target_modules": None,
    # Informational once the tensors are there, or used in training only.
    "task_type": one_of("CAUSAL_LM", None),
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "lora_dropout": None,
    "fan_in_fan_out": None,  # how the backbone stores its weight, not how A and B are stored
    "ensure_weight_tying": None,  # concerns embeddings and heads, which are refused
    "runtime_config": None,
    # Only the initialisation of A and B; those that also change the frozen weights are not in this list.
    "init_lora_weights": one_of(True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "eva_config": None,
    "loftq_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    # Other mathematics.
    "bias": one_of("none"),
    "lora_bias": absent,
    "use_dora": absent,
    "use_qalora": absent,
    "qalora_group_size": None,
    "use_bdlora": absent,
    "alora_invocation_tokens": absent,
    "trainable_token_indices": absent,
    "target_parameters": absent,
    "layer_replication": absent,
    "megatron_config": absent,
    "megatron_core": None,
    "arrow_config": absent,
    "kasa_config": absent,
    "monteclora_config": absent,
    "velora_config": absent,
}

PROMPT_KEYS: Mapping[str, Check | None] = _COMMON | {
    "task_type": one_of("CAUSAL_LM"),
    "num_virtual_tokens": None,
    "token_dim": None,
    "num_transformer_submodules": one_of(1, None),
    "num_attention_heads": None,
    "num_layers": None,
    "prompt_tuning_init": None,
    "prompt_tuning_init_text": None,
    "tokenizer_name_or_path": None,
    "tokenizer_kwargs": None,
}


def plan(files: DeltaFiles, spec: BackboneSpec) -> Plan:
    """What to load. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the key or tensor."""
    config = files.json(CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise UnsupportedDelta(
            f"PEFT's {shown(kind)} is not served; served: {', '.join(_READERS)}", field="peft_type"
        )
    if WEIGHTS in files and PICKLED in files:
        raise InvalidDelta(f"send {WEIGHTS} or {PICKLED}, not both", field=PICKLED)
    weights = PICKLED if PICKLED in files else WEIGHTS
    component = _READERS[kind](config, files, weights, spec)
    return Plan(
        "peft", weights, (component,), provenance(config, ("base_model_name_or_path", "peft_version"))
    )


def _lora(config: Mapping[str, Any], files: DeltaFiles, weights: str, spec: BackboneSpec) -> PlannedComponent:
    check_config(config, LORA_KEYS, CONFIG)
    header = files.header(weights)
    paths: dict[str, str] = {}  # module path -> site
    sources: dict[str, str] = {}
    unknown: list[str] = []
    for key in header.tensors:
        match = _KEY.fullmatch(key)
        site = spec.by_path.get(match["path"]) if match else None
        if "lora_embedding_" in key or (site and (site.kind == SiteKind.EMBEDDING or site.name == "head")):
            raise UnsupportedDelta(
                f"{shown(key)}: LoRA on embeddings and on the output head is not served yet", field=key
            )
        if match is None or site is None or site.kind != SiteKind.LINEAR:
            unknown.append(key)
            continue
        paths[match["path"]] = site.name
        sources[f"{site.name}/{match['side']}"] = key
    refuse_unknown(unknown, weights)
    _check_pairs(header, paths, weights)
    _check_targets(config.get("target_modules"), list(paths))
    return PlannedComponent("lora", _scales(config, header, paths), sources)


def _key(path: str, side: str) -> str:
    return f"base_model.model.{path}.lora_{side}.weight"


def _check_pairs(header: Header, paths: Mapping[str, str], weights: str) -> None:
    missing = [key for path in paths for side in "AB" if (key := _key(path, side)) not in header.tensors]
    if missing:
        raise InvalidDelta(f"{weights}: missing tensors: {listed(missing)}", field=missing[0])
    if not paths:
        raise InvalidDelta(f"{weights} holds no LoRA tensors", field=weights)


def _check_targets(targets: object, paths: list[str]) -> None:
    """``target_modules`` and the tensors must name the same modules, else one of them is ignored somewhere.

    A string is a regular expression there and is not evaluated here: the tensors alone decide.
    """
    if targets is None or isinstance(targets, str):
        return
    if (
        not isinstance(targets, list)
        or len(targets) > _TARGETS_MAX
        or not all(isinstance(target, str) for target in targets)
    ):
        raise InvalidDelta("target_modules must be a list of names or a string", field="target_modules")
    named, met = set(targets), set()
    for path in paths:
        parts = path.split(".")
        suffixes = {".".join(parts[start:]) for start in range(len(parts))} & named
        if not suffixes:
            raise InvalidDelta(
                f"there are tensors for {shown(path)}, which target_modules does not name",
                field="target_modules",
            )
        met |= suffixes
    if named - met:
        raise InvalidDelta(
            f"target_modules names {listed(sorted(named - met))}, for which there are no tensors",
            field="target_modules",
        )


def _scales(config: Mapping[str, Any], header: Header, paths: Mapping[str, str]) -> dict[str, Any]:
    """The canonical config: s = alpha / r, or alpha / sqrt(r); ranks are compared with the tensors'."""
    rank = number(config.get("r", 8), "r")
    alpha = number(config.get("lora_alpha", 8), "lora_alpha")
    ranks, alphas = (Patterns(key, config.get(key)) for key in ("rank_pattern", "alpha_pattern"))
    rslora = config.get("use_rslora", False)

    def scale(alpha: float, rank: float) -> float:
        return alpha / math.sqrt(rank) if rslora else alpha / rank

    if rank < 1:
        raise InvalidDelta("r must be 1 or more", field="r")
    scales: dict[str, float] = {}
    for path, site in paths.items():
        key = _key(path, "A")
        here = ranks.get(path, rank)
        shape = header.tensors[key].shape
        if not shape or shape[0] < 1 or shape[0] != here:
            raise InvalidDelta(
                f"{shown(key)} has shape {list(shape)}, but the config gives it rank {here:g}",
                field="r" if here == rank else "rank_pattern",
            )
        scales[site] = scale(alphas.get(path, alpha), here)
    return {"scale": scale(alpha, rank), "scales": scales}


def _prompt(
    config: Mapping[str, Any], files: DeltaFiles, weights: str, spec: BackboneSpec
) -> PlannedComponent:
    check_config(config, PROMPT_KEYS, CONFIG)
    one_of("CAUSAL_LM")("task_type", config.get("task_type"))
    header = files.header(weights)
    refuse_unknown([key for key in header.tensors if key != _PROMPT_KEY], weights)
    if _PROMPT_KEY not in header.tensors:
        raise InvalidDelta(f"{weights}: missing tensor: {_PROMPT_KEY!r}", field=_PROMPT_KEY)
    shape = header.tensors[_PROMPT_KEY].shape
    wanted = config.get("num_virtual_tokens")
    if len(shape) != 2 or type(wanted) is not int or shape[0] != wanted:
        raise InvalidDelta(
            f"{_PROMPT_KEY} has shape {list(shape)}, but num_virtual_tokens is {printable(str(wanted))}",
            field="num_virtual_tokens",
        )
    width = config.get("token_dim")
    if width is not None and width != spec.hidden:
        raise InvalidDelta(
            f"token_dim is {printable(str(width))}, the backbone's hidden size is {spec.hidden}",
            field="token_dim",
        )
    return PlannedComponent("prompt", {}, {"embeddings": _PROMPT_KEY})


_READERS = {"LORA": _lora, "PROMPT_TUNING": _prompt}
