"""The projection of intrinsic-dimension deltas: the same numbers for ever, spread evenly, and bounded."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS, check, lower
from deltas.methods import intrinsic as module
from deltas.methods.intrinsic import deal, project
from deltas.patches import DenseDiff, Shift
from deltas.sites import BackboneSpec

Q, NORM = "layers.0.attn.q", "layers.0.attn.norm"


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=20,
    )
    return describe(config, "test")


def one(d: int, scales: int = 0, **config: Any) -> Delta:
    tensors = {"theta": torch.arange(1.0, d + 1)} | (
        {"scales": torch.arange(1.0, scales + 1)} if scales else {}
    )
    return Delta((Component("intrinsic", METHODS["intrinsic"].normalise({"seed": 5} | config), tensors),))


def splitmix64(state: int, count: int) -> list[int]:
    """The generator in plain integers, as its authors give it."""
    mask, found = (1 << 64) - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_golden_values() -> None:
    """Whoever trained with this projection has nothing else: these numbers may never change."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    index, negative = deal(7, "layers.0.attn.q/weight", 0, 12, 100)
    assert index.tolist() == [46, 40, 89, 89, 73, 41, 30, 31, 60, 58, 7, 62]
    assert negative.astype(int).tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]
    index, _ = deal((1 << 63) - 1, "norm/bias", 1 << 40, 4, 1 << 31)
    assert index.tolist() == [1276781035, 562739239, 1354568205, 1516366450]


def test_the_deal_is_what_the_docstring_says() -> None:
    seed, target, d = 11, "layers.3.mlp.up/weight", 1000
    digest = hashlib.sha256(f"deltaserve-intrinsic-1/{seed}/{target}".encode()).digest()
    outputs = splitmix64(int.from_bytes(digest[:8], "little"), 500)
    index, negative = deal(seed, target, 0, 500, d)
    assert index.tolist() == [((z >> 32) * d) >> 32 for z in outputs]
    assert negative.tolist() == [bool(z & 1) for z in outputs]
    later, _ = deal(seed, target, 300, 200, d)
    assert later.tolist() == index.tolist()[300:]


def test_the_deal_is_even() -> None:
    index, negative = deal(1, Q, 0, 200_000, 50)
    counts = np.bincount(index, minlength=50)
    assert counts.min() > 0.93 * 4000
    assert counts.max() < 1.07 * 4000
    assert abs(negative.mean() - 0.5) < 0.005
    together = np.bincount(2 * index + negative, minlength=100)
    assert together.min() > 0.9 * 2000  # the sign does not follow the index


def test_lengths_are_kept() -> None:
    """As of every good random projection: |P theta|^2 is about D/d |theta|^2."""
    theta = torch.randn(40, generator=torch.Generator().manual_seed(0))
    moved = project(theta, 3, "x", (300, 200))
    assert float(moved.square().sum() / theta.square().sum()) == pytest.approx(60_000 / 40, rel=0.05)


def test_lowering(spec: BackboneSpec) -> None:
    delta = one(3, scales=3, scale=0.5, sites=[Q, NORM], biases=[Q])
    patches = {(type(p), p.site): p for p in lower(delta, spec)}
    assert len(patches) == 3
    theta = delta.components[0].tensors["theta"]
    for n, (site, parameter, shape) in enumerate(
        [(Q, "weight", (8, 8)), (NORM, "weight", (8,)), (Q, "bias", (8,))]
    ):
        patch = patches[(DenseDiff if parameter == "weight" else Shift, site)]
        found = patch.matrix if isinstance(patch, DenseDiff) else patch.beta  # type: ignore[union-attr]
        assert torch.equal(found, project(theta, 5, f"{site}/{parameter}", shape) * 0.5 * (n + 1))
        assert set(found.abs().reshape(-1).tolist()) <= {0.5 * (n + 1) * k for k in (1, 2, 3)}


def test_targets_seeds_and_pieces_differ(spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    theta = torch.randn(7)
    first = project(theta, 5, "a/weight", (50, 3))
    assert not torch.equal(first, project(theta, 5, "b/weight", (50, 3)))
    assert not torch.equal(first, project(theta, 6, "a/weight", (50, 3)))
    monkeypatch.setattr(module, "_AT_ONCE", 11)
    assert torch.equal(first, project(theta, 5, "a/weight", (50, 3)))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "sites"),
        ({"sites": [Q, Q]}, "sites"),
        ({"sites": Q}, "sites"),
        ({"sites": [Q], "seed": -1}, "seed"),
        ({"sites": [Q], "seed": 1.0}, "seed"),
        ({"sites": [Q], "seed": 1 << 63}, "seed"),
        ({"sites": [Q], "scale": "x"}, "scale"),
        ({"sites": [Q], "biases": [3]}, "biases"),
        ({"sites": [Q], "dimension": 3}, "dimension"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidDelta) as error:
        METHODS["intrinsic"].normalise({"seed": 5} | config)
    assert error.value.field == field


def test_what_does_not_fit_is_refused(spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for delta, field in [
        (one(3, sites=["layers.9.attn.q"]), "sites"),
        (one(3, biases=["layers.0.attn.out"]), "biases"),
        (one(3, sites=["embed"]), "sites"),
        (one(3, scales=1, sites=[Q, NORM]), "scales"),
        (one(0, sites=[Q]), "theta"),
    ]:
        with pytest.raises(InvalidDelta) as error:
            check(delta, spec)
        assert error.value.field == field
    config = one(3, sites=[Q]).components[0].config
    for tensors, field in [({}, "theta"), ({"theta": torch.ones(3), "x": torch.ones(1)}, "x")]:
        with pytest.raises(InvalidDelta) as error:
            check(Delta((Component("intrinsic", config, tensors),)), spec)
        assert error.value.field == field
    monkeypatch.setattr(module, "MAX_ENTRIES", 63)
    with pytest.raises(UnsupportedDelta, match="fills 64 weights, at most 63"):
        check(one(3, sites=[Q]), spec)


def test_one_limit_for_a_delta(spec: BackboneSpec) -> None:
    part = one(3, sites=[Q]).components[0]
    with pytest.raises(UnsupportedDelta, match="two components"):
        check(Delta((part, part)), spec)
