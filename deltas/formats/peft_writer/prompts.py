"""PROMPT_TUNING and PREFIX_TUNING: what stands before a row's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import UnsupportedDelta
from deltas.formats.peft.prompts import WITHOUT_CACHE
from deltas.formats.peft_writer.form import Form
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights

_KEY = "prompt_embeddings"


def prompt(component: Component, weights: SiteWeights) -> Form:
    """PEFT puts prompts before the position embedding and the embedding norm."""
    if component.config.get("after_norm"):
        raise UnsupportedDelta("it stands after the embedding norm; PEFT's prompts stand before it")
    embeddings = component.tensors["embeddings"]
    return Form(
        "PROMPT_TUNING",
        {
            "num_virtual_tokens": embeddings.shape[0],
            "token_dim": weights.spec.hidden,
            "num_transformer_submodules": 1,
            "num_layers": weights.spec.layers,
            "num_attention_heads": weights.spec.heads,
            "prompt_tuning_init": "RANDOM",
        },
        {_KEY: embeddings},
    )


def prefix(component: Component, weights: SiteWeights) -> Form:
    """PEFT's prefixes shift positions, are equally long in every layer, and in T5 lie before the decoder only.

    There PEFT has slots for half of the decoder's layers: layer l and layer l + L/2 use the same.
    """
    spec = weights.spec
    if spec.family in WITHOUT_CACHE:
        raise UnsupportedDelta(f"PEFT hands prefixes over in a cache, which {spec.family} does not take")
    if not component.config.get("shifts_positions"):
        raise UnsupportedDelta("it leaves positions as they are; PEFT's prefixes shift them")
    sites = _layers(component, spec)
    slots: list[Tensor] = []
    for name in sites:
        tensors = component.at(name)
        slots += [tensors["keys"].flatten(1), tensors["values"].flatten(1)]
    if len({len(slot) for slot in slots}) != 1:
        raise UnsupportedDelta("its layers' prefixes differ in length; PEFT's are all alike")
    submodules = 2 if spec.kind == "encoder-decoder" else 1
    if submodules == 2:
        slots = _folded(slots)
    return Form(
        "PREFIX_TUNING",
        {
            "num_virtual_tokens": len(slots[0]),
            "token_dim": spec.kv_heads * spec.head_dim,
            "num_transformer_submodules": submodules,
            "num_layers": spec.layers,
            "num_attention_heads": spec.kv_heads,
            "encoder_hidden_size": None,
            "prefix_projection": False,
        },
        {_KEY: torch.cat(slots, dim=1)},
    )


def _layers(component: Component, spec: BackboneSpec) -> list[str]:
    """The attentions that PEFT puts a prefix before, in order. Raises where others have one, or not all of these."""
    own = [site.name for site in spec.of_kind(SiteKind.KV)]
    if spec.kind == "encoder-decoder":
        own = [name for name in own if name.startswith("decoder.") and ".cross." not in name]
    present = set(component.sites())
    if present - set(own):
        name = min(present - set(own))
        raise UnsupportedDelta(f"it has a prefix at {name}, where PEFT has none", field=name)
    if missing := [name for name in own if name not in present]:
        raise UnsupportedDelta(
            f"it has no prefix at {missing[0]}; PEFT's are in every layer", field=missing[0]
        )
    return own


def _folded(slots: list[Tensor]) -> list[Tensor]:
    """The slots that PEFT, repeating them, makes these of: attention l reads slots 4l and 4l + 1 of the repeated."""
    count = len(slots)
    found: list[Tensor | None] = [None] * count
    for index, slot in enumerate(slots):
        layer, value = divmod(index, 2)
        place = (4 * layer + value) % count
        other = found[place]
        if other is not None and not torch.equal(other, slot):
            raise UnsupportedDelta("its decoder layers differ where PEFT's share one prefix")
        found[place] = slot
    return [torch.zeros_like(slots[0]) if slot is None else slot for slot in found]
