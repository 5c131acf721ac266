"""Transforms of inputs: fed to the backbone's own product where they are of its whole input."""

from __future__ import annotations

import torch
from torch import Tensor

from deltas.bank import PackedDelta, Placed
from deltas.batch import Segment
from deltas.ops.transforms import BatchTransforms
from deltas.patches import InputGain
from tests.unit.ops.test_poison import Linear


class Weighted(Linear):
    """A linear that may be asked for another product."""

    def __init__(self, weight: Tensor, fed: bool) -> None:
        self.weight, self.fed = weight, fed

    def linear(self, out0: int, out: int, x: Tensor) -> Tensor:
        return x @ self.weight[out0 : out0 + out].T


def gained(gain: Tensor, out: int) -> PackedDelta:
    return PackedDelta(gain, {3: (Placed(0, out, InputGain("layers.0.mlp.down", gain)),)})


def test_rows_are_fed_and_then_left_alone() -> None:
    torch.manual_seed(0)
    x, weight, gains = torch.randn(7, 6), torch.randn(5, 6), torch.randn(2, 6)
    segments = [Segment(1, 2, gained(gains[0], 5)), Segment(4, 3, gained(gains[1], 5))]
    transforms = BatchTransforms(segments)
    before = x.clone()
    fed = transforms.feed(3, x, 5)
    assert torch.equal(x, before)
    assert torch.equal(fed[[0, 3]], x[[0, 3]])
    assert torch.equal(fed[1:3], x[1:3] * gains[0])
    assert torch.equal(fed[4:], x[4:] * gains[1])
    assert transforms.feed(2, x, 5) is x
    assert 3 in transforms
    assert 2 not in transforms
    y = fed @ weight.T
    done = y.clone()
    transforms.apply(3, x, done, Weighted(weight, fed=True))
    assert torch.equal(done, y)
    late = x @ weight.T
    transforms.apply(3, x, late, Weighted(weight, fed=False))
    torch.testing.assert_close(late, y)


def test_what_is_of_some_columns_takes_a_product_of_its_own() -> None:
    torch.manual_seed(0)
    x, weight, gain = torch.randn(4, 6), torch.randn(5, 6), torch.randn(6)
    transforms = BatchTransforms([Segment(2, 2, gained(gain, 3))])
    assert transforms.feed(3, x, 5) is x
    y = x @ weight.T
    want = torch.cat([(x * gain) @ weight[:3].T, y[:, 3:]], dim=1)
    transforms.apply(3, x, y, Weighted(weight, fed=False))
    torch.testing.assert_close(y[2:], want[2:])


def test_a_row_with_two_transforms_is_not_fed() -> None:
    gain = torch.ones(6)
    step = Placed(0, 5, InputGain("layers.0.mlp.down", gain))
    delta = PackedDelta(gain, {3: (step, step)})
    x = torch.randn(2, 6)
    assert BatchTransforms([Segment(0, 2, delta)]).feed(3, x, 5) is x
