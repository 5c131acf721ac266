"""PEFT's methods: what they lower to, and what does not fit. That the numbers are right the oracle table shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS, Outline, check, check_outlines, lower
from deltas.patches import (
    DenseDiff,
    Gain,
    InputGain,
    Kronecker,
    LowRank,
    Mix,
    Patch,
    Rotation,
    SparseDiff,
)
from deltas.sites import BackboneSpec

G, Q = "layers.1.mlp.gate", "layers.0.attn.q"  # 8 -> 12 and 8 -> 8
WIDTHS = {G: (12, 8), Q: (8, 8)}


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return describe(LlamaConfig(**sizes, vocab_size=16, max_position_embeddings=20), "test")


def source(key: str) -> Tensor | None:
    """Weights for the two sites."""
    for name, shape in (("gate_proj", WIDTHS[G]), ("q_proj", WIDTHS[Q])):
        if key.endswith(f"{name}.weight"):
            return torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return None


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """A method's valid form: shapes by canonical name, those of integers apart, and the patches that it becomes."""

    method: str
    shapes: Mapping[str, Shape]
    patches: tuple[type[Patch], ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    integers: Mapping[str, Shape] = field(default_factory=dict)
    weights: bool = False  # does it need the backbone's

    @property
    def every(self) -> dict[str, Shape]:
        return {**self.shapes, **self.integers}

    def component(self) -> Component:
        generator = torch.Generator().manual_seed(2)
        floats = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        whole = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in self.integers.items()}
        return Component(self.method, METHODS[self.method].normalise(self.config), {**floats, **whole})


S = {"scale": 0.5}
FORMS = {
    "adalora": Form("adalora", {f"{G}/A": (3, 8), f"{G}/B": (12, 3), f"{G}/E": (3, 1)}, (LowRank,), S),
    "delora": Form(
        "delora",
        {f"{G}/A": (3, 8), f"{G}/B": (12, 3), f"{G}/lambda": (1,), f"{G}/norm": (8,)},
        (LowRank,),
    ),
    "miss": Form("miss", {f"{G}/block": (3, 12)}, (LowRank,)),
    "miss mini": Form("miss", {f"{G}/block": (4, 6)}, (LowRank,)),
    "miss bat": Form("miss", {f"{G}/block": (3, 4, 4)}, (DenseDiff,), weights=True),
    "loha": Form(
        "loha",
        {f"{G}/w1_a": (12, 2), f"{G}/w1_b": (2, 8), f"{G}/w2_a": (12, 2), f"{G}/w2_b": (2, 8)},
        (LowRank,),
        S,
    ),
    "lokr": Form("lokr", {f"{G}/w1": (3, 2), f"{G}/w2_a": (4, 1), f"{G}/w2_b": (1, 4)}, (Kronecker,), S),
    "oft": Form("oft", {f"{G}/Q": (2, 6)}, (Rotation,), {"terms": 5}),
    "oft shared": Form("oft", {f"{G}/Q": (1, 1)}, (Rotation,), {"shared": True, "limit": 0.1}),
    "boft": Form("boft", {f"{G}/R": (2, 2, 4, 4), f"{G}/s": (12,)}, (Rotation, Gain)),
    "hra": Form("hra", {f"{G}/u": (8, 3)}, (LowRank,), {"orthogonal": True}, weights=True),
    "road": Form("road", {f"{G}/theta": (6,), f"{G}/alpha": (6,)}, (Mix,), {"variant": 1, "group": 4}),
    "fourierft": Form("fourierft", {f"{G}/spectrum": (9,)}, (DenseDiff,), S | {"seed": 3}),
    "waveft": Form("waveft", {f"{G}/spectrum": (9,)}, (SparseDiff,), S | {"seed": 3, "haar": True}),
    "c3a": Form("c3a", {f"{G}/kernel": (3, 2, 4)}, (DenseDiff,)),
    "hira": Form("hira", {f"{G}/A": (2, 8), f"{G}/B": (12, 2)}, (DenseDiff,), weights=True),
    "randlora": Form(
        "randlora",
        {f"{G}/lambda": (3, 3), f"{G}/gamma": (3, 8), "A": (3, 1, 8), "B": (12, 3, 3)},
        (DenseDiff,),
        S,
    ),
    "randlora seed": Form(
        "randlora",
        {f"{G}/lambda": (3, 3), f"{G}/gamma": (3, 8)},
        (DenseDiff,),
        S | {"seed": 1, "sparsity": "none"},
    ),
    "vblora": Form(
        "vblora",
        {f"{G}/logits_A": (2, 2, 5), f"{G}/logits_B": (3, 2, 5), "bank": (5, 4)},
        (LowRank,),
        {"topk": 2},
    ),
    "vblora topk": Form(
        "vblora",
        {f"{G}/weights_A": (2, 2, 1), f"{G}/weights_B": (3, 2, 1), "bank": (5, 4)},
        (LowRank,),
        {"topk": 2},
        {f"{G}/indices_A": (2, 2, 2), f"{G}/indices_B": (3, 2, 2)},
    ),
    "unilora": Form(
        "unilora",
        {f"{G}/scales_A": (2, 8), f"{G}/scales_B": (12, 2), "theta": (7,)},
        (LowRank,),
        {},
        {f"{G}/indices_A": (2, 8), f"{G}/indices_B": (12, 2)},
    ),
    "unilora seed": Form(
        "unilora", {"theta": (7,)}, (LowRank, LowRank), {"seed": 1, "rank": 2, "sites": [Q, G]}
    ),
    "tinylora": Form(
        "tinylora", {f"{G}/A": (2, 8), f"{G}/B": (12, 2), f"{G}/v": (3,), f"{G}/P": (3, 2, 2)}, (LowRank,)
    ),
    "tinylora seed": Form(
        "tinylora", {f"{G}/A": (2, 8), f"{G}/B": (12, 2), f"{G}/v": (3,)}, (LowRank,), {"seeds": {G: 4}}
    ),
    "gralora": Form("gralora", {f"{G}/A": (2, 4, 4), f"{G}/B": (2, 4, 6)}, (DenseDiff,), S),
    "deft": Form(
        "deft", {f"{G}/P": (12, 2), f"{G}/R": (2, 8)}, (LowRank,), S | {"orthogonal": True}, weights=True
    ),
    "peanut": Form(
        "peanut",
        {f"{G}/A": (3, 12), f"{G}/B": (12, 3), f"{G}/e0": (3, 3), f"{G}/d0": (3, 3)},
        (LowRank,),
        S | {"activation": "relu"},
        weights=True,
    ),
    "supertuning": Form("supertuning", {f"{G}/values": (3,)}, (SparseDiff,), {}, {f"{G}/indices": (3,)}),
    "supertuning largest": Form(
        "supertuning", {f"{G}/values": (3,)}, (SparseDiff,), {"largest": True}, weights=True
    ),
    "vera": Form("vera", {f"{G}/b": (12,), f"{G}/d": (3,), "A": (3, 8), "B": (12, 3)}, (LowRank,)),
    "vera seed": Form("vera", {f"{G}/b": (12,), f"{G}/d": (3,)}, (LowRank,), {"seed": 3}),
    "pvera": Form(
        "vera",
        {f"{G}/b": (12,), f"{G}/d": (6,), "A": (6, 8), "B": (12, 3)},
        (LowRank,),
        {"probabilistic": True},
    ),
    "glora": Form("glora", {f"{G}/A": (12, 1), f"{G}/B": (1,)}, (Gain, LowRank, DenseDiff)),
}


@pytest.mark.parametrize("name", FORMS)
def test_lowering(name: str, spec: BackboneSpec) -> None:
    form = FORMS[name]
    delta = Delta((form.component(),))
    check(delta, spec)
    patches = lower(delta, spec, source)
    assert {type(patch) for patch in patches} <= {*form.patches, InputGain}
    assert {patch.site for patch in patches if hasattr(patch, "site")} <= {G, Q}
    if form.weights:
        with pytest.raises(UnsupportedDelta, match="not at hand"):
            lower(delta, spec)
    else:
        lower(delta, spec)


def outline(form: Form, **changed: Shape | None) -> Outline:
    shapes = {name: shape for name, shape in {**form.every, **changed}.items() if shape is not None}
    return Outline(form.method, METHODS[form.method].normalise(form.config), shapes)


def wrong(shape: Shape) -> list[Shape | None]:
    """Shapes that cannot be right in a form with several tensors, or have no size."""
    found: list[Shape | None] = [(), (0, *shape[1:]), (*shape, 2), shape[1:], (shape[0] + 1, *shape[1:])]
    if len(shape) > 1:
        found.append((*shape[:-1], shape[-1] + 1))
    return found


# Tensors whose size is theirs to choose, along the first dimension or the last.
FREE = {
    ("miss", f"{G}/block", 0),
    ("miss mini", f"{G}/block", 0),
    ("hra", f"{G}/u", -1),
    ("fourierft", f"{G}/spectrum", 0),
    ("waveft", f"{G}/spectrum", 0),
    ("unilora", "theta", 0),
    ("unilora seed", "theta", 0),
    ("tinylora seed", f"{G}/v", 0),
    ("supertuning largest", f"{G}/values", 0),
    ("vblora topk", "bank", 0),
    ("vera", "B", 0),
    ("vera", "A", -1),
    ("pvera", "B", 0),
    ("pvera", "A", -1),
    ("vera seed", f"{G}/d", 0),
    ("lokr", f"{G}/w2_a", 0),
    ("randlora", "A", -1),
    ("randlora", "B", 0),
}
# Shapes that are another form of the same method.
OTHERS = {("miss bat", (4, 4)), ("glora", (1,))}


@pytest.mark.parametrize("name", FORMS)
def test_shapes_that_do_not_fit_are_refused(name: str, spec: BackboneSpec) -> None:
    form = FORMS[name]
    for tensor, shape in form.every.items():
        for other in wrong(shape):
            if (name, other) in OTHERS:
                continue
            if other is not None and len(other) == len(shape) and 0 not in other:
                at = 0 if other[0] != shape[0] else -1
                if (name, tensor, at) in FREE:
                    continue
            with pytest.raises(InvalidDelta) as caught:
                check_outlines([outline(form, **{tensor: other})], spec)
            assert caught.value.field, (tensor, other)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_missing_or_too_much_is_refused(name: str, spec: BackboneSpec) -> None:
    form = FORMS[name]
    optional = {"glora"} if name == "glora" else {"deft", "peanut"} & {form.method}
    for tensor in form.every:
        if not optional:
            with pytest.raises(DeltaError) as caught:
                check_outlines([outline(form, **{tensor: None})], spec)
            assert caught.value.field, tensor
    for extra in (f"{G}/surprise", "surprise", "layers.9.mlp.gate/A", "norm/A"):
        with pytest.raises(InvalidDelta) as caught:
            check_outlines([outline(form, **{extra: (2, 2)})], spec)
        assert caught.value.field == extra


@pytest.mark.parametrize("name", FORMS)
def test_configs_that_are_refused(name: str) -> None:
    form = FORMS[name]
    normalise = METHODS[form.method].normalise
    assert normalise(normalise(form.config)) == normalise(form.config)
    for key in (*form.config, "surprise"):
        for value in (None, "x", -1, [1], {"x": "y"}, float("nan"), 1 << 64):
            changed = {**form.config, key: value}
            try:
                result = normalise(changed)
            except InvalidDelta as error:
                assert error.field  # noqa: PT017
            else:
                assert key != "surprise"
                assert normalise(result) == result


def test_a_short_vector_is_not_dealt_to_any_number_of_entries() -> None:
    """Their memory has nothing to do with the upload's size."""
    wide = describe(
        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        "test",
    )
    sites = [site.name for site in wide.sites.values() if site.name.endswith(("attn.q", "mlp.up"))]
    for rank, served in ((16, True), (4096, False)):
        config = METHODS["unilora"].normalise({"seed": 1, "rank": rank, "sites": sites})
        outline = Outline("unilora", config, {"theta": (256,)})
        if served:
            check_outlines([outline], wide)
        else:
            with pytest.raises(UnsupportedDelta) as caught:
                check_outlines([outline], wide)
            assert caught.value.field == "rank"
