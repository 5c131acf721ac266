"""Diff pruning, masking, SHiRA and dense differences: what they lower to, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config, LlamaConfig

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS, check, check_values, integers, lower
from deltas.patches import DenseDiff, Patch, Shift, SparseDiff
from deltas.sites import BackboneSpec

Q, NORM, EMBED, DOWN = "layers.0.attn.q", "layers.1.mlp.norm", "embed", "layers.1.mlp.down"
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    return describe(LlamaConfig(**SIZES, vocab_size=16, max_position_embeddings=20), "test")


@pytest.fixture(scope="module")
def bert() -> BackboneSpec:
    return describe(BertConfig(**SIZES, vocab_size=16, max_position_embeddings=20), "test")


def places(*lines: list[int]) -> Tensor:
    return torch.tensor(lines)


def one(method: str, tensors: dict[str, Tensor], **config: Any) -> Delta:
    return Delta((Component(method, config, tensors),))


def dense(patch: Patch, *shape: int) -> Tensor:
    assert isinstance(patch, SparseDiff)
    return torch.zeros(shape).index_put_((patch.rows, patch.columns), patch.values, accumulate=True)


def test_diff_pruning(spec: BackboneSpec) -> None:
    tensors = {
        f"{DOWN}/indices": places([7, 0, 7], [11, 2, 3]),
        f"{DOWN}/values": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        f"{NORM}/indices": places([5, 1]),
        f"{NORM}/values": torch.tensor([0.5, -0.5]),
        f"{Q}/bias_indices": places([0, 0]),
        f"{Q}/bias_values": torch.tensor([1.0, 2.0]),
        f"{EMBED}/indices": places([15, 15], [7, 0]),
        f"{EMBED}/values": torch.tensor([4.0, 5.0]),
    }
    embed, shift, norm, down = lower(one("diff_pruning", tensors), spec)
    expected = torch.zeros(8, 12)
    expected[7, 11], expected[0, 2], expected[7, 3] = 1, 2, 3
    assert torch.equal(dense(down, 8, 12), expected)
    assert isinstance(norm, DenseDiff)
    assert norm.matrix.tolist() == [0, -0.5, 0, 0, 0, 0.5, 0, 0]
    assert isinstance(shift, Shift)
    assert shift.site == Q
    assert shift.beta.tolist() == [3.0] + [0.0] * 7  # repeated places add
    assert dense(embed, 16, 8)[15].tolist() == [5, 0, 0, 0, 0, 0, 0, 4]


def test_shira(spec: BackboneSpec) -> None:
    tensors = {f"{Q}/indices": places([1, 2], [3, 4]), f"{Q}/values": torch.tensor([1.0, -2.0])}
    config = METHODS["shira"].normalise({"scale": 1, "scales": {Q: 0.5}})
    (patch,) = lower(one("shira", tensors, **config), spec)
    assert dense(patch, 8, 8)[1, 3] == 0.5
    assert dense(patch, 8, 8)[2, 4] == -1.0


def test_masking_takes_the_weights_away(bert: BackboneSpec) -> None:
    own = {"weight": torch.arange(64.0).reshape(8, 8) + 1, "bias": torch.arange(8.0) + 1}
    tensors = {f"{Q}/indices": places([1, 2, 1], [3, 4, 3]), f"{Q}/bias_indices": places([6, 6])}
    patch, shift = lower(one("masking", tensors), bert, lambda key: own[key.rpartition(".")[2]])
    change = dense(patch, 8, 8)
    assert (own["weight"] + change)[[1, 2], [3, 4]].tolist() == [0, 0]  # a repeated place is zeroed once
    assert change.count_nonzero() == 2
    assert isinstance(shift, Shift)
    assert (own["bias"] + shift.beta).tolist() == [1, 2, 3, 4, 5, 6, 0, 8]


@pytest.mark.parametrize("parameter", ["indices", "bias_indices"])
def test_masking_needs_the_weights(bert: BackboneSpec, parameter: str) -> None:
    where = places([1], [1]) if parameter == "indices" else places([1])
    with pytest.raises(UnsupportedDelta, match="not at hand"):
        lower(one("masking", {f"{Q}/{parameter}": where}), bert)


def test_a_mask_is_not_applied_twice(spec: BackboneSpec) -> None:
    part = one("masking", {f"{Q}/indices": places([1], [1])}).components[0]
    with pytest.raises(UnsupportedDelta, match="two components change the mask"):
        check(Delta((part, part)), spec)
    gpt2 = describe(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=20), "test")
    tensors = {f"layers.0.attn.{leaf}/indices": places([1], [1]) for leaf in ("qkv", "v")}
    with pytest.raises(InvalidDelta, match="of which it is part"):
        check(one("masking", tensors), gpt2)


def test_dense(spec: BackboneSpec) -> None:
    tensors = {
        f"{EMBED}/matrix": torch.ones(16, 8),
        f"{DOWN}/matrix": torch.randn(8, 12).half(),
        f"{DOWN}/beta": torch.ones(8),
        f"{NORM}/matrix": torch.ones(8),
        "head/matrix": torch.ones(16, 8),
    }
    patches = lower(one("dense", tensors), spec)
    shapes = {patch.site: list(patch.matrix.shape) for patch in patches if isinstance(patch, DenseDiff)}
    assert shapes == {EMBED: [16, 8], NORM: [8], DOWN: [8, 12], "head": [16, 8]}
    assert [patch.site for patch in patches if isinstance(patch, Shift)] == [DOWN]
    assert all(t.dtype == torch.float32 for p in patches if isinstance(p, DenseDiff) for t in [p.matrix])


def test_differences_at_one_site_are_added(spec: BackboneSpec) -> None:
    sparse = {f"{Q}/indices": places([1], [3]), f"{Q}/values": torch.ones(1)}
    full = {f"{Q}/matrix": torch.ones(8, 8)}
    both = Delta(
        (
            Component("diff_pruning", {}, sparse),
            Component("shira", {"scale": 2.0}, sparse),
            Component("dense", {}, full),
            Component("dense", {}, full),
        )
    )
    first, second = lower(both, spec)
    assert dense(first, 8, 8)[1, 3] == 3
    assert isinstance(second, DenseDiff)
    assert torch.equal(second.matrix, torch.full((8, 8), 2.0))


ENTRY = {f"{Q}/indices": places([1], [3]), f"{Q}/values": torch.ones(1)}


@pytest.mark.parametrize(
    ("method", "tensors", "field"),
    [
        ("diff_pruning", {f"{Q}/indices": places([1], [3])}, f"{Q}/values"),
        ("diff_pruning", {f"{Q}/bias_values": torch.ones(1)}, f"{Q}/bias_indices"),
        ("diff_pruning", ENTRY | {f"{Q}/values": torch.ones(2)}, f"{Q}/values"),
        ("diff_pruning", ENTRY | {f"{Q}/indices": places([1])}, f"{Q}/indices"),
        ("diff_pruning", ENTRY | {f"{Q}/indices": torch.zeros(2, 0, dtype=torch.int64)}, f"{Q}/indices"),
        ("diff_pruning", ENTRY | {f"{Q}/weight": torch.ones(1)}, f"{Q}/weight"),
        ("diff_pruning", {"layers.0.attn.out/indices": places([1])}, "layers.0.attn.out/indices"),
        ("diff_pruning", {f"{NORM}/indices": places([1], [1]), f"{NORM}/values": torch.ones(1)}, f"{NORM}/indices"),
        (
            "diff_pruning",
            {f"{EMBED}/bias_indices": places([1]), f"{EMBED}/bias_values": torch.ones(1)},
            f"{EMBED}/bias_indices",
        ),
        (
            "diff_pruning",
            {f"{Q}/indices": torch.zeros(2, 65, dtype=torch.int64), f"{Q}/values": torch.ones(65)},
            f"{Q}/indices",
        ),
        ("masking", {f"{Q}/bias_indices": places([1])}, f"{Q}/bias_indices"),  # Llama has no bias
        ("masking", ENTRY, f"{Q}/values"),
        ("shira", {f"{NORM}/indices": places([1]), f"{NORM}/values": torch.ones(1)}, f"{NORM}/indices"),
        ("dense", {f"{Q}/matrix": torch.ones(8, 9)}, f"{Q}/matrix"),
        ("dense", {f"{Q}/beta": torch.ones(8)}, f"{Q}/matrix"),
        ("dense", {f"{Q}/matrix": torch.ones(8, 8), f"{Q}/beta": torch.ones(9)}, f"{Q}/beta"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    spec: BackboneSpec, method: str, tensors: dict[str, Tensor], field: str
) -> None:
    with pytest.raises(InvalidDelta) as error:
        check(one(method, tensors, **({"scale": 1.0} if method == "shira" else {})), spec)
    assert error.value.field == field


@pytest.mark.parametrize("method", ["diff_pruning", "masking", "shira"])
@pytest.mark.parametrize("place", [(8, 0), (-1, 0), (0, 8), (0, 1 << 40)])
def test_places_outside_the_weight_are_refused(
    spec: BackboneSpec, method: str, place: tuple[int, int]
) -> None:
    tensors = {f"{Q}/indices": places(*([0, i] for i in place))}
    if method != "masking":
        tensors[f"{Q}/values"] = torch.ones(2)
    assert integers(method) >= {"indices"}
    delta = one(method, tensors, **({"scale": 1.0} if method == "shira" else {}))
    check(delta, spec)
    with pytest.raises(InvalidDelta, match=r"outside 0 \.\. 7") as error:
        check_values(delta, spec)
    assert error.value.field == f"{Q}/indices"


@pytest.mark.parametrize("method", ["diff_pruning", "masking", "dense"])
def test_there_is_no_config(method: str) -> None:
    assert METHODS[method].normalise({}) == {}
    with pytest.raises(InvalidDelta, match="unknown config key 'scale'"):
        METHODS[method].normalise({"scale": 1.0})
