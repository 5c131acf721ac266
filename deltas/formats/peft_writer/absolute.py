"""Absolute values in PEFT: LN_TUNING and TRAINABLE_TOKENS on their own; ``bias``, ``modules_to_save`` and trained tokens
beside another type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft_writer.form import PREFIX, Form, Here, Modules, alike, sites_of, targets
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights

_ROWS = "trainable_tokens_delta"

# The types whose configs have ``bias``: trained biases beside the tuner.
WITH_BIAS = frozenset(
    {
        *(
            "ADALORA",
            "BOFT",
            "C3A",
            "DEFT",
            "DELORA",
            "FOURIERFT",
            "GLORA",
            "GRALORA",
            "HRA",
            "LORA",
            "MISS",
            "OFT",
        ),
        *("PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
    }
)


def ln_tuning(component: Component, weights: SiteWeights) -> Form:
    """Any module's values replaced, norms or not; what the delta leaves alone is the backbone's own."""
    modules = Modules()
    for here in sites_of(component, weights.spec):
        values = _whole(here, weights)
        modules.add(here.path, {f"ln_tuning_layers.{name}": tensor for name, tensor in values.items()})
    return modules.form("LN_TUNING", {})


def trainable_tokens(component: Component, weights: SiteWeights) -> Form:
    """PEFT changes an embedding and, unasked, everything tied to it: the head's rows must be here too, and the same."""
    modules, spec = Modules(), weights.spec
    sites = sites_of(component, spec)
    indices = alike((here.tensors["indices"].tolist() for here in sites), "tokens")
    tied = _tied(sites, spec)
    for here in [here for here in sites if here not in tied]:
        modules.add(_embedding(here), {_ROWS: here.tensors["rows"]})
    if tied:
        modules.add(spec.sites["embed"].path, {_ROWS: tied[0].tensors["rows"]})
        modules.tensors |= {f"{PREFIX}{here.path}.{_ROWS}": here.tensors["rows"] for here in tied}
    return modules.form("TRAINABLE_TOKENS", {"token_indices": indices})


def beside(form: Form, component: Component, weights: SiteWeights) -> Form:
    """The form with a component's absolute values added. Raises where PEFT has no place for them."""
    if form.modules is None:
        raise UnsupportedDelta(f"PEFT puts nothing beside {form.peft_type}")
    if component.method == "tokens":
        return _tokens_beside(form, component, weights)
    biases: dict[str, Tensor] = {}
    modules: dict[str, Tensor] = {}
    saved: list[str] = []
    for here in sites_of(component, weights.spec):
        wrapped = here.path in form.modules
        biased = form.peft_type in WITH_BIAS and here.site.bias
        if "beta" in here.tensors and not biased:
            raise UnsupportedDelta(
                f"it shifts {here.site.name}, where PEFT has no bias to train beside {form.peft_type}",
                field=here.site.name,
            )
        if "weight" not in here.tensors and biased:
            middle = "base_layer." if wrapped else ""
            biases[f"{PREFIX}{here.path}.{middle}bias"] = _bias(here, weights)
            continue
        if wrapped:
            raise UnsupportedDelta(
                f"it replaces the values of {here.site.name}, which {form.peft_type} changes already; "
                "PEFT does one or the other",
                field=here.site.name,
            )
        saved.append(here.path)
        for name, tensor in _whole(here, weights).items():
            modules[f"{PREFIX}{here.path}.{name}"] = tensor
    config: dict[str, Any] = dict(form.config)
    if biases:
        config["bias"] = "all"
    if saved:
        config["modules_to_save"] = sorted({*config.get("modules_to_save", ()), *saved})
    return replace(form, config=config, tensors={**form.tensors, **biases, **modules})


def joined(components: Iterable[Component], spec: BackboneSpec) -> list[Component]:
    """Absolute values by method, each in one component. PEFT drops the bias of a tied head whose tokens are trained: where
    the delta does so too, it need not say it.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    heads: list[Component] = []
    for component in components:
        if component.method == "head":
            heads.append(component)
            continue
        method = "override" if component.method == "ln" else component.method
        tensors.setdefault(method, {}).update(component.tensors)
    head = spec.sites.get("head")
    if spec.tied and head is not None and head.bias and "head/rows" in tensors.get("tokens", {}):
        bias = tensors.get("override", {}).pop("head/bias", None)
        if bias is None or bool(bias.any()):
            raise UnsupportedDelta(
                "it trains tokens of a tied head and keeps the head's bias, which PEFT drops", field="head"
            )
    return [*(Component(method, {}, found) for method, found in tensors.items() if found), *heads]


def _tokens_beside(form: Form, component: Component, weights: SiteWeights) -> Form:
    spec, sites = weights.spec, sites_of(component, weights.spec)
    if form.peft_type != "LORA":
        raise UnsupportedDelta(f"PEFT has trained tokens beside LORA only, not beside {form.peft_type}")
    tied = _tied(sites, spec)
    named = {_embedding(here): here for here in sites if here not in tied}
    if tied:
        named[spec.sites["embed"].path] = tied[0]
    indices: dict[str, list[int]] = {}
    tensors = dict(form.tensors)
    for path, here in named.items():
        indices[targets([path], spec)[0]] = here.tensors["indices"].tolist()
        tensors[f"{PREFIX}{path}.token_adapter.{_ROWS}"] = here.tensors["rows"]
    return replace(form, config={**form.config, "trainable_token_indices": indices}, tensors=tensors)


def _tied(sites: list[Here], spec: BackboneSpec) -> list[Here]:
    """The sites that follow the input embedding: PEFT names that one only. None where nothing is tied.

    T5 calls its stacks' own modules and not the embedding that they are tied to, so it can train them alone too.
    """
    if not spec.tied:
        return []
    called = [] if spec.kind == "encoder-decoder" else ["embed"]
    names = [n for n in (*called, "encoder.embed", "decoder.embed", "head") if n in spec.sites]
    found = [here for here in sites if here.site.name in names]
    if not found or (not called and all(here.site.kind is SiteKind.EMBEDDING for here in found)):
        return []
    rows = [here.tensors["rows"] for here in found]
    if len(found) < len(names) or any(not torch.equal(other, rows[0]) for other in rows):
        raise UnsupportedDelta("it changes only some of what is tied together, which PEFT changes as one")
    return found


def _embedding(here: Here) -> str:
    if here.site.kind is not SiteKind.EMBEDDING:
        raise UnsupportedDelta(
            f"it changes tokens of {here.site.name} alone; PEFT those of embeddings", field=here.site.name
        )
    return here.path


def _whole(here: Here, weights: SiteWeights) -> dict[str, Tensor]:
    """Weight and bias as the module stores them, of the backbone's own what the delta lacks."""
    site, tensors = here.site, here.tensors
    weight = tensors["weight"] if "weight" in tensors else weights.weight(site)
    if weights.spec.conv1d and site.kind is SiteKind.LINEAR and site.name != "head":
        weight = weight.T
    values = {"weight": weight}
    if site.bias or "bias" in tensors:
        values["bias"] = _bias(here, weights)
    return values


def _bias(here: Here, weights: SiteWeights) -> Tensor:
    own = weights.bias(here.site) if here.site.bias else None
    if "beta" in here.tensors and own is not None:
        beta = here.tensors["beta"]
        return (own + beta.to(torch.float32)).to(beta.dtype)
    if "bias" in here.tensors and here.site.bias:
        return here.tensors["bias"]
    if own is None:
        raise UnsupportedDelta(
            f"it gives {here.site.name} a bias, and the backbone has none there to replace",
            field=here.site.name,
        )
    return own
