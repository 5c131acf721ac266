"""Every other decoder in the engine: packed rows give what Hugging Face's own model gives, deltas of all kinds included.

A row of a mixed batch, the same row alone and the stock model computing with that delta (``families.py``) agree; on
models whose attention sees a window of tokens, with and without caps on its scores, on either form of residual.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltas import methods
from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import UnsupportedDelta
from deltas.ops import Mode
from deltas.sites import BackboneSpec, SiteKind
from server.engine.backbone import SERVED
from server.engine.probe import Probe
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.unit.backbones import tiny
from tests.unit.engine.families import MODULES, Modules, greedy, with_delta

STEPS = 4
TOLERANCE = 1e-5


class Draw:
    """Random tensors of a size that matters."""

    def __init__(self, seed: int) -> None:
        self.make = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.make) * 0.3


def lora(spec: BackboneSpec, seed: int, rank: int, *leaves: str) -> Component:
    draw, tensors = Draw(seed), {}
    for site in spec.of_kind(SiteKind.LINEAR):
        if site.name != "head" and (not leaves or site.name.endswith(leaves)):
            tensors[f"{site.name}/A"] = draw(rank, site.in_features)
            tensors[f"{site.name}/B"] = draw(site.out_features, rank)
    return Component("lora", {"scale": 0.7}, tensors)


def bitfit(spec: BackboneSpec, seed: int) -> Component:
    sites, draw = spec.of_kind(SiteKind.LINEAR, SiteKind.NORM), Draw(seed)
    return Component("bitfit", {}, {f"{site.name}/beta": draw(site.out_features) for site in sites})


def bottleneck(spec: BackboneSpec, seed: int, width: int, reads: str) -> Component:
    draw, tensors, hidden = Draw(seed), {}, spec.hidden
    for site in spec.of_kind(SiteKind.BLOCK):
        tensors[f"{site.name}/down"] = draw(width, hidden)
        tensors[f"{site.name}/down_bias"] = draw(width)
        tensors[f"{site.name}/up"] = draw(hidden, width)
        tensors[f"{site.name}/up_bias"] = draw(hidden)
    return Component("bottleneck", {"activation": "gelu", "reads": reads, "scale": 1.5}, tensors)


def norms(spec: BackboneSpec, seed: int) -> Component:
    draw, tensors = Draw(seed), {}
    for site in spec.of_kind(SiteKind.NORM):
        tensors[f"{site.name}/weight"] = 1 + draw(site.out_features)
        if site.bias:
            tensors[f"{site.name}/bias"] = draw(site.out_features)
    return Component("ln", {}, tensors)


def norm_changes(spec: BackboneSpec, seed: int) -> Component:
    sites, draw = spec.of_kind(SiteKind.NORM), Draw(seed)
    return Component("dense", {}, {f"{site.name}/matrix": draw(site.out_features) for site in sites})


def tables(spec: BackboneSpec, seed: int) -> Component:
    sites, draw = spec.of_kind(SiteKind.EMBEDDING), Draw(seed)
    values = {f"{site.name}/weight": draw(site.in_features, site.out_features) for site in sites}
    return Component("override", {}, values)


def table_changes(spec: BackboneSpec, seed: int) -> Component:
    sites, draw = spec.of_kind(SiteKind.EMBEDDING), Draw(seed)
    values = {f"{site.name}/matrix": draw(site.in_features, site.out_features) for site in sites}
    return Component("dense", {}, values)


def prompt(spec: BackboneSpec, seed: int, length: int) -> Component:
    return Component("prompt", {}, {"embeddings": Draw(seed)(length, spec.hidden)})


def deltas_of(spec: BackboneSpec) -> Mapping[str, Delta]:
    return {
        "attention": Delta((lora(spec, 1, 4, ".q", ".v", ".qkv", ".o"),)),
        "every": Delta((lora(spec, 2, 5),)),
        "bitfit": Delta((bitfit(spec, 3),)),
        "after": Delta((bottleneck(spec, 4, 6, "output"),)),
        "added": Delta((bottleneck(spec, 5, 7, "output+residual"),)),
        "beside": Delta((bottleneck(spec, 6, 5, "residual"),)),
        "inside": Delta((bottleneck(spec, 7, 4, "inner"),)),
        "norms": Delta((norms(spec, 8),)),
        "norm changes": Delta((norm_changes(spec, 9),)),
        "tables": Delta((tables(spec, 10),)),
        "table changes": Delta((table_changes(spec, 11),)),
        "prompt": Delta((prompt(spec, 12, 7),)),
        "prompt and lora": Delta((prompt(spec, 13, 3), lora(spec, 14, 2, ".k", ".qkv", ".up", ".down"))),
    }


class Stock:
    """One family's stock model in a folder, and what it gives with each delta; computed once for all modes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = tiny.save(name, folder)
        self.modules: Modules = MODULES[tiny.family_of(name)]
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="eager"
        ).eval()
        self._known: dict[tuple[str, int], list[Tensor]] = {}

    def logits(self, name: str, delta: Delta | None, tokens: list[int]) -> list[Tensor]:
        key = (name, len(tokens))
        if key not in self._known:
            model, before = (
                (self.model, None) if delta is None else with_delta(self.model, self.modules, delta)
            )
            self._known[key] = greedy(model, tokens, STEPS, before)
        return self._known[key]


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return Stock(request.param, tmp_path_factory.mktemp("backbone"))


def text(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, tiny.VOCAB) for _ in range(length)]


LENGTHS = (1, 2, 30, 5, 17, 33)


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
def test_mixed_equals_alone_equals_hugging_face(stock: Stock, mode: Mode) -> None:
    runner = make_runner(stock.folder, torch.float32, mode, capacity=tiny.POSITIONS)
    deltas = deltas_of(runner.backbone.spec)
    packed = {name: place(runner, delta) for name, delta in deltas.items()}
    names = [*packed, "base", "base", "attention", "every", "prompt"]
    random.Random(7).shuffle(names)
    rows = [Row(text(LENGTHS[i % 6]), packed.get(name), name) for i, name in enumerate(names)]
    generate(runner, rows, STEPS, chunk=37)
    moved = dict.fromkeys(deltas, 0.0)
    for row in rows:
        alone = Row(row.prompt, row.delta, row.name)
        generate(runner, [alone], STEPS)
        expected = stock.logits(row.name, deltas.get(row.name), row.prompt)
        if row.name in deltas:  # a window may hide a prompt from the end of a long row, not from a short one
            own = stock.logits("base", None, row.prompt)
            moved[row.name] = max(moved[row.name], same(own[0], row.logits[0]))
        for step, source in enumerate(expected):
            assert same(row.logits[step], source) < TOLERANCE, (row.name, len(row.prompt), step)
            assert same(alone.logits[step], source) < TOLERANCE, (row.name, len(row.prompt), step)
        assert row.tokens == alone.tokens
    assert min(moved.values()) > 0.01, moved


def test_a_row_may_fill_the_context(stock: Stock) -> None:
    """Every position is used, the window, if there is one, long left behind; the prompt comes in chunks."""
    row = Row(text(tiny.POSITIONS - STEPS + 1))
    runner = make_runner(stock.folder, torch.float32, capacity=tiny.POSITIONS)
    generate(runner, [row], STEPS, chunk=7)
    for ours, source in zip(row.logits, greedy(stock.model, row.prompt, STEPS), strict=True):
        assert same(ours, source) < TOLERANCE


def test_weights_and_names_stay(stock: Stock) -> None:
    runner = make_runner(stock.folder, torch.float32, capacity=8)
    ours, stocks = runner.backbone.model.state_dict(), stock.model.state_dict()
    assert list(ours) == list(stocks)
    assert all(torch.equal(ours[key], stocks[key]) for key in stocks)


def test_the_probe_sees_every_delta_act(stock: Stock) -> None:
    runner = make_runner(stock.folder, torch.float32, capacity=tiny.POSITIONS)
    probe = Probe(runner)
    for name, delta in deltas_of(runner.backbone.spec).items():
        assert probe.run(place(runner, delta)).outcome == "changes", name


def test_no_invertible_adapter_behind_embeddings_that_are_scaled() -> None:
    """It changes what the embedding gives; the hook is before the factor."""
    draw, tensors = Draw(1), {}
    for half in "fg":
        tensors |= {f"embed/{half}_down": draw(4, 16), f"embed/{half}_down_bias": draw(4)}
        tensors |= {f"embed/{half}_up": draw(16, 4), f"embed/{half}_up_bias": draw(16)}
    delta = Delta((Component("invertible", {"activation": "relu"}, tensors),))
    specs = {name: describe(tiny.CONFIGS[name](), "r1") for name in ("gemma", "mistral")}
    methods.check(delta, specs["mistral"])
    with pytest.raises(UnsupportedDelta, match="scaled") as caught:
        methods.check(delta, specs["gemma"])
    assert caught.value.field == "embed"


def test_every_family_is_served() -> None:
    assert set(MODULES) == {tiny.family_of(name) for name in tiny.CONFIGS}
    assert set(MODULES) <= set(SERVED)
