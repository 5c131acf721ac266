"""A task head beside another method: SEQ_CLS and TOKEN_CLS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft.heads import HEADS
from deltas.formats.peft_writer.form import PREFIX, SHARED, Form
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
    paths, activations, pooling = HEADS.get((spec.family, task), ((), (), ""))
    if (list(activations), pooling) != (config["activations"], config["pooling"]):
        raise UnsupportedDelta(
            f"it is not the head of {spec.family}'s own class for {task}: {len(config['activations'])} layers "
            f"({', '.join(config['activations'])}), pooling {config['pooling']}"
        )
    start = SHARED if form.modules is None else PREFIX  # beside a prompt PEFT wraps no model
    tensors: dict[str, Tensor] = {}
    for index, path in enumerate(paths):
        weight = component.tensors[f"layers.{index}/weight"]
        bias = component.tensors.get(f"layers.{index}/bias")
        tensors[f"{start}{path}.weight"] = weight
        if spec.kind == "decoder" and task == "SEQ_CLS":
            if bias is not None and bool(bias.any()):
                raise UnsupportedDelta(f"its bias: {path} of {spec.family} has none")
        else:
            tensors[f"{start}{path}.bias"] = torch.zeros(weight.shape[0]) if bias is None else bias
    names = {first if (first := path.split(".")[0]) in _KNOWN else path for path in paths}
    added: dict[str, Any] = {"task_type": task}
    if form.modules is not None:
        added["modules_to_save"] = sorted({*form.config.get("modules_to_save", ()), *names})
    elif names - set(_KNOWN):
        raise UnsupportedDelta(f"{min(names - set(_KNOWN))}: PEFT saves no such module beside a prompt")
    return replace(form, config={**form.config, **added}, tensors={**form.tensors, **tensors})
