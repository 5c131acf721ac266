"""What is particular to one method or another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from deltas.delta import Component
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS
from deltas.methods.intrinsic import project
from deltas.patches import Bottleneck, DenseDiff, Head, KVPrefix, LowRank, Pooling, SoftPrompt, SparseDiff
from deltas.tensors import tensors_of
from deltas.tuned import tunable
from deltas.tuned.prompts import with_init_tokens
from tests.tunables import Started, begin, same, weights_of


def stored(started: Started) -> Component:
    return started.method.component(started.parameters, started.options, started.sites, started.weights)


@pytest.mark.parametrize(
    ("method", "given", "field"),
    [
        ("lora", {"rank": 0}, "rank"),
        ("lora", {"rank": True}, "rank"),
        ("lora", {"alpha": float("nan")}, "alpha"),
        ("lora", {"dora": 1}, "dora"),
        ("bottleneck", {"width": 4, "reduction_factor": 2}, "width"),
        ("bottleneck", {"activation": "swish"}, "activation"),
        ("compacter", {"pieces": 3}, "pieces"),
        ("compacter", {"width": 6}, "pieces"),
        ("prompt", {"init": "text"}, "init"),
        ("prompt", {"init_tokens": [1]}, "init"),
        ("prompt", {"init": "text", "init_text": "nobody tokenized it"}, "init_text"),
        ("prompt", {"init": "text", "init_tokens": [10**6]}, "init_tokens"),
        ("prompt", {"length": 4096}, "length"),
        ("prefix", {"length": 4096}, "length"),
        ("head", {}, "labels"),
        ("head", {"labels": ["a", "a"]}, "labels"),
        ("head", {"labels": ["a", "b"], "outputs": 3}, "outputs"),
        ("head", {"labels": ["a", "b"], "kind": "tag", "pooling": "mean"}, "pooling"),
        ("head", {"labels": ["a", "b"], "pooling": "none"}, "pooling"),
        ("diff_pruning", {"density": 0.0}, "density"),
        ("intrinsic", {"dimensions": 0}, "dimensions"),
    ],
)
def test_wrong_options(method: str, given: Mapping[str, Any], field: str) -> None:
    with pytest.raises(DeltaError) as wrong:
        tunable(method).options(given, weights_of("bert").spec)
    assert wrong.value.field == field


def test_a_lora_goes_on_with_another_rank_and_scale() -> None:
    started = begin("lora", "llama", {"rank": 4, "alpha": 4}, moved=0.1)
    component = stored(started)
    options = tunable("lora").options({"rank": 8, "alpha": 32, "rslora": True}, started.weights.spec)
    resumed = tunable("lora").resume(component, options)
    again = tunable("lora").patches(resumed, options, started.sites, started.weights, None)
    for ours, theirs in zip(again, started.patches(), strict=True):
        assert isinstance(ours, LowRank)
        assert isinstance(theirs, LowRank)
        assert torch.equal(ours.down, theirs.down)
        assert torch.allclose(ours.up, theirs.up, atol=1e-6)


def test_what_cannot_go_on_is_refused() -> None:
    spec = weights_of("llama").spec
    lora = stored(begin("lora", "llama"))
    with pytest.raises(UnsupportedDelta, match="dora"):
        tunable("lora").resume(lora, tunable("lora").options({"dora": True}, spec))
    pissa = replace(lora, config={**lora.config, "init": "pissa"})
    with pytest.raises(UnsupportedDelta, match="pissa"):
        tunable("lora").resume(pissa, tunable("lora").options({}, spec))
    adapter = stored(begin("bottleneck", "llama"))
    with pytest.raises(UnsupportedDelta, match="activation"):
        tunable("bottleneck").resume(adapter, tunable("bottleneck").options({"activation": "tanh"}, spec))
    prefix = stored(begin("prefix", "llama"))
    with pytest.raises(UnsupportedDelta, match="reparametrise"):
        tunable("prefix").resume(prefix, tunable("prefix").options({"reparametrise": True}, spec))
    head = stored(begin("head", "llama"))
    with pytest.raises(UnsupportedDelta, match="labels"):
        tunable("head").resume(head, tunable("head").options({"labels": ["yes", "no"]}, spec))


def test_widths() -> None:
    started = begin("bottleneck", "bert", {"reduction_factor": 4})
    hidden = started.weights.spec.hidden
    (first, *_) = started.patches()
    assert isinstance(first, Bottleneck)
    assert first.down.shape == (hidden // 4, hidden)
    assert first.plain  # what the kernels take
    assert begin("bottleneck", "bert", {"width": 3}).options["width"] == 3
    assert begin("bottleneck", "bert", {"reduction_factor": 1000}).options["width"] == 1


def test_a_prefix_that_a_perceptron_makes_is_folded() -> None:
    started = begin("prefix", "llama", {"length": 5, "reparametrise": True, "width": 7}, moved=0.1)
    component = stored(started)
    assert same(started.patches(), METHODS["prefix"].lower(component, started.weights))
    spec = started.weights.spec
    assert {tuple(t.shape) for t in component.tensors.values()} == {(5, spec.kv_heads, spec.head_dim)}
    patches = started.patches(torch.Generator())
    assert all(isinstance(patch, KVPrefix) for patch in patches)
    torch.stack([t.square().sum() for t in tensors_of(patches)]).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in started.parameters.values():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())


def test_prompts_begin_with_tokens() -> None:
    for family in ("bert", "t5"):
        started = begin("prompt", family, {"length": 6})
        table = started.weights.weight(started.sites[0])
        (prompt,) = started.patches()
        assert isinstance(prompt, SoftPrompt)
        assert all(bool((table == row).all(1).any()) for row in prompt.embeddings)
        text = begin("prompt", family, {"length": 4, "init": "text", "init_tokens": [9, 8, 7]})
        assert torch.equal(text.parameters["embeddings"], table[[9, 8, 7, 9]])
        drawn = begin("prompt", family, {"length": 40, "init": "random"}).parameters["embeddings"]
        assert 0.8 < float(drawn.detach().std() / table.std()) < 1.2


def test_an_init_text_becomes_tokens() -> None:
    spec = weights_of("bert").spec
    given = with_init_tokens({"length": 4, "init_text": "abc"}, lambda text: [len(text), 8, 7])
    options = tunable("prompt").options(given, spec)
    assert (options["init"], options["init_tokens"], options["init_text"]) == ("text", [3, 8, 7], None)
    assert with_init_tokens({"length": 4}, lambda text: []) == {"length": 4}
    for wrong, field in (
        ({"init_text": "a", "init_tokens": [1]}, "init_text"),
        ({"init_text": "a", "init": "random"}, "init"),
        ({"init_text": ""}, "init_text"),
        ({"init_text": 3}, "init_text"),
        ({"init_text": "x" * 20_000}, "init_text"),
        ({"init_text": "\u200b"}, "init_text"),  # of which this tokenizer makes nothing
    ):
        with pytest.raises(InvalidDelta) as refused:
            with_init_tokens(wrong, lambda text: [ord(c) for c in text if c.isalpha()])
        assert refused.value.field == field


def test_ia3_takes_its_scale_in() -> None:
    started = begin("ia3", "llama", moved=0.1)
    component = replace(stored(started), config={"scale": 2.0})
    resumed = started.method.resume(component, started.options)
    patches = started.method.patches(resumed, started.options, started.sites, started.weights, None)
    assert same(patches, METHODS["ia3"].lower(component, started.weights))


def test_diff_pruning_keeps_its_density() -> None:
    started = begin("diff_pruning", "bert", {"density": 0.02}, moved=0.1)
    entries = sum(torch.Size(site.weight_shape).numel() for site in started.sites)
    kept = sum(len(t) for name, t in stored(started).tensors.items() if name.endswith("/values"))
    assert 0.019 * entries < kept <= 0.02 * entries + 1
    assert all(isinstance(patch, SparseDiff) for patch in started.patches())
    first, second = (started.patches(torch.Generator().manual_seed(n)) for n in (1, 2))
    assert all(isinstance(patch, DenseDiff) for patch in first)
    assert not same(first, second)  # gates are drawn
    assert same(first, started.patches(torch.Generator().manual_seed(1)))


def test_open_gates_have_a_price_down_to_the_density() -> None:
    started = begin("diff_pruning", "bert", {"density": 0.02, "penalty": 3.0})
    price = started.method.penalty(started.parameters, started.options)
    assert price is not None
    assert float(price.detach()) == pytest.approx(3 * (0.9933 - 0.02), abs=1e-3)
    price.backward()  # type: ignore[no-untyped-call]
    for name, parameter in started.parameters.items():
        if name.endswith("/gates"):
            assert parameter.grad is not None
            assert bool((parameter.grad > 0).all())
    closed = {n: t.detach() - (1.0 if n.endswith("/gates") else 0.0) for n, t in started.parameters.items()}
    assert float(started.method.penalty(closed, started.options) or 0) == 0


@pytest.mark.parametrize("name", ["diff_pruning", "masking"])
def test_a_component_is_never_empty(name: str) -> None:
    started = begin(name, "bert", {"sparsity": 0.0} if name == "masking" else {})
    component = stored(started)
    assert sum(t.shape[-1] for n, t in component.tensors.items() if n.endswith("/indices")) == 1


def test_a_mask_is_binary_and_its_gradient_goes_straight_through() -> None:
    started = begin("masking", "bert", {"sparsity": 0.3})
    patches = started.patches(torch.Generator())
    for site, patch in zip(started.sites, patches, strict=True):
        assert isinstance(patch, DenseDiff)
        weight, scores = started.weights.weight(site), started.parameters[f"{site.name}/scores"]
        masked = scores < 0
        assert 0.2 < float(masked.float().mean()) < 0.4
        assert torch.allclose(patch.matrix, torch.where(masked, -weight, 0.0), atol=1e-7)
        patch.matrix.sum().backward()  # type: ignore[no-untyped-call]
        assert scores.grad is not None
        assert torch.equal(scores.grad, weight)


def test_the_projection_is_that_of_the_stored_form() -> None:
    started = begin("intrinsic", "bert", {"dimensions": 5, "structured": False, "seed": 3}, moved=1.0)
    for site, patch in zip(started.sites, started.patches(), strict=True):
        assert isinstance(patch, DenseDiff)
        theta = started.parameters["theta"].detach()
        assert torch.equal(patch.matrix, project(theta, 3, f"{site.name}/weight", site.weight_shape))


@pytest.mark.parametrize(
    ("family", "given", "pooling", "layers"),
    [
        ("llama", {"labels": ["a", "b"]}, Pooling.LAST, 1),
        ("bert", {"labels": ["a", "b", "c"], "dense": True}, Pooling.MEAN, 2),
        ("t5", {"kind": "regress"}, Pooling.MEAN, 1),
        ("bert", {"kind": "tag", "labels": ["O", "B"]}, Pooling.NONE, 1),
        ("bert", {"outputs": 4, "pooling": "first"}, Pooling.FIRST, 1),
    ],
)
def test_heads(family: str, given: dict[str, Any], pooling: Pooling, layers: int) -> None:
    method, weights = tunable("head"), weights_of(family)
    options = method.options(given, weights.spec)
    start = method.start(options, [], weights, torch.Generator())
    (head,) = method.patches(start, options, [], weights, None)
    assert isinstance(head, Head)
    assert head.pooling is pooling
    assert len(head.layers) == layers
    assert head.layers[-1].weight.shape[0] == options["outputs"]
    assert head.labels == (tuple(given["labels"]) if "labels" in given else None)


def test_targets_of_whole_modules_have_their_biases() -> None:
    started = begin("selective_module", "bert", targets=["layers.0.mlp.down", "embed"])
    assert set(started.parameters) == {"embed/matrix", "layers.0.mlp.down/matrix", "layers.0.mlp.down/beta"}
    with pytest.raises(InvalidDelta, match="name some"):
        tunable("selective").sites(None, started.weights.spec)
