"""Bottlenecks with options, fusions, gates and couplings against their formulas, and rows that stay apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.bank import PackedDelta, Placed
from deltas.batch import Segment, merge
from deltas.compose import combine, weighted
from deltas.errors import UnsupportedDelta
from deltas.ops.adapters import adapt, couple, opening
from deltas.patches import (
    Activation,
    Affine,
    BlockInput,
    Bottleneck,
    Coupling,
    Fusion,
    Gain,
    Gate,
    GatedGain,
    GatedLowRank,
    KVPrefix,
    Patch,
)
from deltas.weights import SiteWeights

T, H, M = 5, 6, 3


class Block:
    """A post-norm block whose norm doubles."""

    def normed(self, x: Tensor, /) -> Tensor:
        return 2 * x


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) * 7 + len(shape)))


H_OUT, RESIDUAL = draw(T, H), draw(T, H) * 2


def bottleneck(**options: object) -> Bottleneck:
    base = Bottleneck("s", draw(M, H), draw(M), draw(M, H + 0), draw(H), Activation.TANH, BlockInput.OUTPUT)
    return replace(base, **options)  # type: ignore[arg-type]


def added(patch: Bottleneck, z: Tensor) -> Tensor:
    return torch.tanh(z @ patch.down.T + patch.down_bias) @ patch.up + patch.up_bias


def result(patch: Bottleneck | Fusion) -> Tensor:
    y = H_OUT.clone()
    adapt(patch, RESIDUAL, y, Block(), slice(0, T))  # type: ignore[arg-type]
    return y


def norm(x: Tensor, affine: Affine) -> Tensor:
    return F.layer_norm(x, (H,), affine.weight, affine.bias)


NORM, GATE = Affine(draw(H), draw(H)), Gate(draw(1, H), draw(1))


@pytest.mark.parametrize(
    ("onto", "start"),
    [
        (BlockInput.OUTPUT, H_OUT),
        (BlockInput.OUTPUT_AND_RESIDUAL, H_OUT + RESIDUAL),
        (BlockInput.NORMED, 2 * (H_OUT + RESIDUAL)),
    ],
)
def test_what_is_added_to(onto: BlockInput, start: Tensor) -> None:
    patch = bottleneck(onto=onto)
    torch.testing.assert_close(result(patch), start + added(patch, H_OUT))


def test_norms_and_gate() -> None:
    patch = bottleneck(norm_before=NORM, norm_after=NORM, gate=GATE)
    gate = torch.sigmoid(H_OUT @ GATE.weight.T + GATE.bias).mean()
    torch.testing.assert_close(opening(GATE, H_OUT), gate[None])
    u = added(patch, norm(H_OUT, NORM)) * gate
    torch.testing.assert_close(result(patch), H_OUT + norm(u, NORM))
    torch.testing.assert_close(result(replace(patch, norm_around=True)), norm(H_OUT + u, NORM))


@pytest.mark.parametrize("around", [False, True])
def test_fusion(around: bool) -> None:
    parts = (bottleneck(), bottleneck(up=draw(M, H) * 3))
    query, key, value = Affine(draw(H, H), draw(H)), Affine(draw(H, H), draw(H)), Affine(draw(H, H), None)
    patch = Fusion("s", parts, query, key, value, BlockInput.RESIDUAL, BlockInput.OUTPUT, around=around)
    options = torch.stack([added(part, H_OUT) for part in parts])
    if around:
        options = options + H_OUT
    q = F.linear(RESIDUAL, query.weight, query.bias)
    scores = (F.linear(options, key.weight, key.bias) * q).sum(-1)
    mixed = (scores.softmax(0)[..., None] * F.linear(options, value.weight)).sum(0)
    torch.testing.assert_close(result(patch), mixed if around else mixed + H_OUT)


def test_coupling() -> None:
    half = H // 2
    layers = [Affine(draw(M, half), draw(M)), Affine(draw(half, M), draw(half))]
    patch = Coupling("s", layers[0], layers[1], layers[0], layers[1], Activation.RELU)
    y = H_OUT.clone()
    couple(patch, y)

    def perceptron(x: Tensor) -> Tensor:
        inner = F.relu(F.linear(x, layers[0].weight, layers[0].bias))
        return F.linear(inner, layers[1].weight, layers[1].bias)

    a = H_OUT[:, :half] + perceptron(H_OUT[:, half:])
    torch.testing.assert_close(y, torch.cat([a, H_OUT[:, half:] + perceptron(a)], dim=1))


def test_shares_of_what_is_not_a_sum(weights: SiteWeights) -> None:
    for patch in (bottleneck(norm_after=NORM, norm_around=True), bottleneck(onto=BlockInput.NORMED)):
        part = weighted(patch, 0.25, weights)
        assert isinstance(part, Bottleneck)
        torch.testing.assert_close(result(part), H_OUT + 0.25 * (result(patch) - H_OUT))
    gain = GatedGain("s", draw(H), GATE)
    part = weighted(weighted(gain, 0.5, weights), 0.5, weights)
    assert isinstance(part, GatedGain)
    torch.testing.assert_close(part.rest + 0.3 * part.gain, 0.75 + 0.25 * 0.3 * gain.gain)


def test_blocks_chain_in_order_whatever_they_are() -> None:
    fusion = Fusion("s", (bottleneck(),), None, None, None, BlockInput.OUTPUT, BlockInput.OUTPUT)
    lists: list[list[Patch]] = [[bottleneck()], [fusion], [bottleneck(onto=BlockInput.NORMED)]]
    assert combine(lists) == [part[0] for part in lists]


@pytest.mark.parametrize(
    "pair",
    [
        [GatedGain("s", draw(H), GATE), Gain("s", draw(H), multiplies=True)],
        [GatedGain("s", draw(H), GATE), GatedGain("s", draw(H), GATE)],
        [
            KVPrefix("s", draw(2, 1, H), draw(2, 1, H), shifts_positions=False, gate=GATE),
            KVPrefix("s", draw(2, 1, H), draw(2, 1, H), shifts_positions=False),
        ],
        [
            KVPrefix("s", draw(2, 1, H), draw(2, 1, H), shifts_positions=False, shifts_keys=True),
            KVPrefix("s", draw(2, 1, H), draw(2, 1, H), shifts_positions=False),
        ],
    ],
)
def test_pairs_without_a_meaning_are_refused(pair: list[Patch]) -> None:
    with pytest.raises(UnsupportedDelta) as caught:
        combine([[patch] for patch in pair])
    assert caught.value.field == "s"


def test_rows_with_a_gate_are_never_joined() -> None:
    def packed(patch: Patch) -> PackedDelta:
        return PackedDelta(torch.zeros(1), {0: (Placed(0, H, patch),)})

    gated = [packed(GatedLowRank("s", draw(M, H), draw(M, H), GATE)), packed(bottleneck(gate=GATE))]
    free = packed(bottleneck(norm_after=NORM))
    for delta, count in ((gated[0], 2), (gated[1], 2), (free, 1)):
        assert len(merge([Segment(0, 3, delta), Segment(3, 3, delta)])) == count


@pytest.fixture
def weights() -> SiteWeights:
    return SiteWeights(None, None)  # type: ignore[arg-type]
