"""What holds of every method that can be trained, on every family of backbones."""

from __future__ import annotations

import json

import pytest
import torch

from deltas import methods
from deltas.delta import Component, Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS
from deltas.tensors import tensors_of
from deltas.tuned import ALIASES, TUNABLE, tunable
from tests.tunables import FAMILIES, GIVEN, begin, same, weights_of

NOT_THERE = {("prefix", "modernbert")}
NOT_RESUMED = {"diff_pruning", "masking"}
WITHOUT_TARGETS = {"head", "selective_module"}
CASES = [(name, family) for name in TUNABLE for family in FAMILIES if (name, family) not in NOT_THERE]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_is_stored_acts_as_what_was_trained(name: str, family: str) -> None:
    started = begin(name, family, moved=0.1)
    component = started.method.component(started.parameters, started.options, started.sites, started.weights)
    delta = Delta((component,))
    methods.check(delta, started.weights.spec)
    methods.check_values(delta, started.weights.spec)
    lowered = METHODS[component.method].lower(component, started.weights)
    assert lowered
    assert same(started.patches(), lowered)
    assert json.loads(json.dumps(component.config)) == component.config
    for tensor in component.tensors.values():
        assert not tensor.requires_grad
        assert tensor.is_contiguous()


@pytest.mark.parametrize(("name", "family"), CASES)
def test_gradients_reach_every_parameter(name: str, family: str) -> None:
    started = begin(name, family, moved=0.1)
    patches = started.patches(torch.Generator().manual_seed(3))
    torch.stack([t.square().sum() for t in tensors_of(patches) if t.requires_grad]).sum().backward()  # type: ignore[no-untyped-call]
    for key, parameter in started.parameters.items():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key
        assert bool(parameter.grad.any()), key


@pytest.mark.parametrize("name", TUNABLE)
def test_the_start_depends_on_nothing_but_the_generator(name: str) -> None:
    first, second = begin(name, "bert"), begin(name, "bert")
    assert first.parameters.keys() == second.parameters.keys()
    for key, parameter in first.parameters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, second.parameters[key])


@pytest.mark.parametrize(("name", "family"), CASES)
def test_training_goes_on_from_the_same_function(name: str, family: str) -> None:
    started = begin(name, family, moved=0.1)
    component = started.method.component(started.parameters, started.options, started.sites, started.weights)
    assert started.method.stored_sites(component, started.weights.spec) == started.sites
    if name in NOT_RESUMED:
        with pytest.raises(UnsupportedDelta):
            started.method.resume(component, started.options)
        return
    resumed = started.method.resume(component, started.options)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in resumed.values())
    patches = started.method.patches(resumed, started.options, started.sites, started.weights, None)
    assert same(patches, METHODS[component.method].lower(component, started.weights))


@pytest.mark.parametrize("name", TUNABLE)
def test_complete_options_are_taken_again(name: str) -> None:
    spec = weights_of("bert").spec
    options = tunable(name).options(GIVEN.get(name, {}), spec)
    assert tunable(name).options(options, spec) == options
    assert json.loads(json.dumps(options)) == options


@pytest.mark.parametrize("name", TUNABLE)
def test_sites_by_their_own_names(name: str) -> None:
    for family in FAMILIES:
        if (name, family) not in NOT_THERE and name not in WITHOUT_TARGETS:
            spec = weights_of(family).spec
            sites = tunable(name).sites(None, spec)
            assert tunable(name).sites([site.name for site in sites], spec) == sites


@pytest.mark.parametrize("name", TUNABLE)
def test_what_is_wrong_is_named(name: str) -> None:
    spec = weights_of("bert").spec
    with pytest.raises(InvalidDelta) as wrong:
        tunable(name).options({"rnak": 8}, spec)
    assert wrong.value.field == "rnak"
    with pytest.raises(InvalidDelta) as nowhere:
        tunable(name).sites(["nowhere"], spec)
    assert nowhere.value.field == "targets"
    with pytest.raises(UnsupportedDelta):
        tunable(name).resume(Component("boft", {}, {}), tunable(name).options(GIVEN.get(name, {}), spec))


def test_unknown_methods_list_the_known_ones() -> None:
    with pytest.raises(InvalidDelta, match=r"bitfit.*lora") as unknown:
        tunable("lorra")
    assert unknown.value.field == "method"
    assert tunable("adapter") is TUNABLE["bottleneck"]
    assert set(ALIASES.values()) <= TUNABLE.keys()
    assert not ALIASES.keys() & TUNABLE.keys()
