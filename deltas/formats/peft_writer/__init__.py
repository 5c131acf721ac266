"""Writes a canonical delta as PEFT 0.21's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

A PEFT folder holds one type of tuner, with absolute values of other modules beside it. So one component becomes the
type, those that replace values go with it, and what PEFT cannot say is refused: what it would load must compute what the
delta computes. Tensors keep their dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from deltas import methods
from deltas.delta import Component, Delta
from deltas.errors import UnsupportedDelta
from deltas.formats.peft_writer import absolute, entries, factors, heads, prompts, transforms
from deltas.formats.peft_writer.form import Form, Writer, targets
from deltas.formats.peft_writer.lora import lora
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights, Source

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_VERSION = "0.21.2"  # whose files these are

_WRITERS: Mapping[str, Writer] = {
    "adalora": factors.adalora,
    "bitfit": transforms.beft,
    "boft": transforms.boft,
    "c3a": entries.c3a,
    "deft": factors.deft,
    "delora": factors.delora,
    "fourierft": entries.fourierft,
    "glora": entries.glora,
    "gralora": factors.gralora,
    "hira": factors.hira,
    "hra": transforms.hra,
    "ia3": transforms.ia3,
    "loha": factors.loha,
    "lokr": factors.lokr,
    "lora": lora,
    "miss": factors.miss,
    "oft": transforms.oft,
    "override": absolute.ln_tuning,
    "peanut": entries.peanut,
    "prefix": prompts.prefix,
    "prompt": prompts.prompt,
    "randlora": factors.randlora,
    "road": transforms.road,
    "shira": entries.shira,
    "supertuning": entries.supertuning,
    "tinylora": entries.tinylora,
    "tokens": absolute.trainable_tokens,
    "unilora": entries.unilora,
    "vblora": factors.vblora,
    "vera": factors.vera,
    "waveft": entries.waveft,
}

# What each writer takes from a component's config. A key that it does not know would be lost, so it is refused.
_SCALES = ("scale", "scales")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "adalora": _SCALES,
    "deft": (*_SCALES, "orthogonal"),
    "fourierft": ("scale", "seed"),
    "gralora": ("scale",),
    "head": ("kind", "pooling", "activations", "labels", "norm_eps"),
    "hra": ("orthogonal",),
    "ia3": ("scale",),
    "loha": _SCALES,
    "lokr": _SCALES,
    "lora": (*_SCALES, "dora", "init"),
    "oft": ("terms", "shared", "limit"),
    "peanut": ("scale", "activation"),
    "prefix": ("shifts_positions",),
    "prompt": ("after_norm",),
    "randlora": ("scale", "seed", "sparsity"),
    "road": ("variant", "group"),
    "shira": _SCALES,
    "supertuning": ("largest", "scale"),
    "tinylora": ("seeds",),
    "unilora": ("seed", "rank", "sites"),
    "vblora": ("topk",),
    "vera": ("seed", "probabilistic"),
    "waveft": ("scale", "seed", "haar"),
}

# Absolute values, which stand beside other methods or are a type of their own.
_ABSOLUTE = frozenset({"bitfit", "head", "ln", "override", "tokens"})

WRITTEN = frozenset({*_WRITERS, *_ABSOLUTE})
"""The methods that PEFT has, if not every use of them."""

REFUSED: Mapping[tuple[str, ...], str] = {
    (
        "bottleneck",
        "compacter",
        "low_rank_adapter",
        "fusion",
        "invertible",
    ): "PEFT has no adapters of this kind",
    ("gated_lora", "gated_ia3"): "PEFT has no gates",
    ("dense_vera", "mtl_lora"): "PEFT has no such products of factors",
    ("diff_pruning", "masking", "dense", "intrinsic"): "PEFT has no differences of this kind",
    (
        "packed_prefix",
        "opendelta_prefix",
    ): "PEFT's prefixes are keys and values by layer that shift positions",
}
"""The others, and why they are not written."""

_TASKS = {"decoder": "CAUSAL_LM", "encoder": None, "encoder-decoder": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class PeftFiles:
    """What goes into the two files."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def export(
    delta: Delta, spec: BackboneSpec, *, source: Source | None = None, base_model: str | None = None
) -> PeftFiles:
    """The delta as PEFT has it. ``source`` gives the backbone's own tensors, which some files repeat; ``base_model``
    is what the config calls the backbone where the delta's metadata do not say.

    Raises :class:`~deltas.errors.UnsupportedDelta`, naming the component and why, where PEFT has no such delta, and
    what :func:`deltas.methods.check` raises.
    """
    methods.check(delta, spec)
    form = _form(delta, SiteWeights(spec, source))
    config: dict[str, Any] = {
        "peft_type": form.peft_type,
        "task_type": _task(form, spec),
        "base_model_name_or_path": delta.metadata.get("base_model_name_or_path", base_model),
        "inference_mode": True,
        "peft_version": _VERSION,
    }
    if form.modules is not None:
        config["target_modules"] = targets(form.modules, spec)
    if form.peft_type in absolute.WITH_BIAS:
        config["bias"] = "none"
    config |= form.config
    return PeftFiles(config, form.tensors)


def save(
    delta: Delta,
    spec: BackboneSpec,
    folder: Path,
    *,
    source: Source | None = None,
    base_model: str | None = None,
) -> list[Path]:
    """Write the two files to ``folder``, which must be there; their paths. Raises what :func:`export` does."""
    files = export(delta, spec, source=source, base_model=base_model)
    config, weights = folder / CONFIG, folder / WEIGHTS
    config.write_text(json.dumps(files.config, indent=2, sort_keys=True) + "\n")
    save_file({name: t.clone().contiguous() for name, t in files.tensors.items()}, weights, {"format": "pt"})
    return [config, weights]


def _form(delta: Delta, weights: SiteWeights) -> Form:
    """One component that makes the type, and what stands beside it; absolute values alone have types of their own."""
    named = [(f"component {i} ({part.method})", part) for i, part in enumerate(delta.components)]
    for where, part in named:
        unknown = set(part.config) - set(_KEYS.get(part.method, ())) if part.method in WRITTEN else ()
        if unknown:
            raise UnsupportedDelta(f"{where}: PEFT has nothing for its {min(unknown)}", field=min(unknown))
    makers = [(where, part) for where, part in named if part.method not in _ABSOLUTE]
    if not makers:
        makers = [(where, part) for where, part in named if part.method == "bitfit"][:1]
    if len(makers) > 1:
        raise UnsupportedDelta(
            f"{makers[0][0]} and {makers[1][0]}: a PEFT folder holds one method", field="components"
        )
    others = [part for _, part in named if all(part is not maker for _, maker in makers)]
    rest = [(part.method, part) for part in absolute.joined(others, weights.spec)]
    if makers:
        form = _write(makers[0][0], makers[0][1], weights)
    else:
        rest.sort(key=lambda pair: pair[0] != "tokens")
        form = _write(*rest.pop(0), weights)
    for where, part in rest:
        with _naming(where):
            add = heads.beside if part.method == "head" else absolute.beside
            form = add(form, part, weights)
    return form


def _write(where: str, component: Component, weights: SiteWeights) -> Form:
    with _naming(where):
        writer = _WRITERS.get(component.method)
        if writer is None:
            raise UnsupportedDelta(_why_not(component.method))
        return writer(component, weights)


def _why_not(method: str) -> str:
    if method in WRITTEN:
        return "PEFT has it beside another method only"
    return next((reason for names, reason in REFUSED.items() if method in names), "PEFT has no such method")


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Errors say which component they are about."""
    try:
        yield
    except UnsupportedDelta as error:
        raise UnsupportedDelta(f"{where}: {error}", field=error.field or "components") from None


def _task(form: Form, spec: BackboneSpec) -> str | None:
    """PEFT has no task for masked language models, and runs prompts there as a feature extractor's."""
    if form.modules is None and spec.kind == "encoder":
        return "FEATURE_EXTRACTION"
    return _TASKS[spec.kind]
