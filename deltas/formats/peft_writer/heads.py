"""A task head beside another method: SEQ_CLS and TOKEN_CLS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft.heads import own_head
from deltas.formats.peft_writer.form import PREFIX, SHARED, Form
from deltas.sites import BackboneSpec
from deltas.weights import SiteWeights

_TASKS = {"classify": "SEQ_CLS", "regress": "SEQ_CLS", "tag": "TOKEN_CLS"}
# PEFT saves these of its own accord; the others must be named.
_KNOWN = ("classifier", "score")


def beside(form: Form, component: Component, weights: SiteWeights) -> Form:
    """The form with the head's tensors and its task. The labels' names have no place in PEFT's files.

    Raises where the backbone's own class for the task has a head of another make.
    """
    config, spec = component.config, weights.spec
    task = _TASKS[config["kind"]]
    head = own_head(spec, task)
    if head is None or _form(component) != (list(head.activations), head.pooling, head.norm_eps):
        raise UnsupportedDelta(
            f"it is not the head of {spec.family}'s own class for {task}: {len(config['activations'])} layers "
            f"({', '.join(config['activations'])}), pooling {config['pooling']}"
        )
    start = SHARED if form.modules is None else PREFIX  # beside a prompt PEFT wraps no model
    tensors: dict[str, Tensor] = {}
    for index, path in enumerate(head.paths):
        weight = component.tensors[f"layers.{index}/weight"]
        tensors[f"{start}{path}.weight"] = weight
        unbiased = (spec.kind == "decoder" and task == "SEQ_CLS") or _unbiased(path, spec)
        tensors |= _bias(f"{start}{path}", component.tensors.get(f"layers.{index}/bias"), weight, unbiased)
    for index, path in enumerate(head.norms):
        norm = component.tensors.get(f"layers.{index}/norm")
        if (norm is None) == bool(path):
            raise UnsupportedDelta(f"the norms of {spec.family}'s own class for {task} are not where its are")
        if norm is not None:
            tensors[f"{start}{path}.weight"] = norm
            bias = component.tensors.get(f"layers.{index}/norm_bias")
            tensors |= _bias(f"{start}{path}", bias, norm, _unbiased(path, spec))
    paths = [*head.paths, *filter(None, head.norms)]
    names = {
        next((name for name in _KNOWN if path.split(".")[0].endswith(name)), path)  # as PEFT matches them
        for path in paths
    }
    added: dict[str, Any] = {"task_type": task}
    if form.modules is not None:
        added["modules_to_save"] = sorted({*form.config.get("modules_to_save", ()), *names})
    elif names - set(_KNOWN):
        raise UnsupportedDelta(f"{min(names - set(_KNOWN))}: PEFT saves no such module beside a prompt")
    return replace(form, config={**form.config, **added}, tensors={**form.tensors, **tensors})


def _form(component: Component) -> tuple[list[str], str, float | None]:
    config = component.config
    return config["activations"], config["pooling"], config.get("norm_eps")


def _unbiased(path: str, spec: BackboneSpec) -> bool:
    """Is this a module that has a site, and no bias? ModernBERT's heads are called as its language model's is."""
    site = spec.by_path.get(path)
    return site is not None and not site.bias


def _bias(path: str, bias: Tensor | None, weight: Tensor, unbiased: bool) -> dict[str, Tensor]:
    """The bias of a module, zeros where the component has none; nothing where the module has none."""
    if unbiased:
        if bias is not None and bool(bias.any()):
            raise UnsupportedDelta(f"its bias: {path} has none")
        return {}
    return {f"{path}.bias": torch.zeros(weight.shape[0]) if bias is None else bias}
