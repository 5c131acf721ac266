"""What overflows in one delta reaches its own rows and no others, to the bit, in every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from deltas import methods
from deltas.backbones import describe
from deltas.bank import PackedDelta
from deltas.batch import Segment
from deltas.errors import InvalidDelta
from deltas.groups import places, site_groups
from deltas.ops import Mode, Ops
from deltas.pack import pack
from tests.oracle.padded import BACKBONES
from tests.tiny import random_delta

SPEC = describe(AutoConfig.from_pretrained(BACKBONES / "llama"), "test")
PLACE = places(SPEC)["layers.0.attn.q"]


class Linear:
    """What a step may ask of a plain linear; nothing here asks."""

    fed = False

    def linear(self, out0: int, out: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def bias(self, out0: int, out: int) -> Tensor | None:
        raise NotImplementedError

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def norm_change(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def inner(self, rows: slice) -> Tensor:
        raise NotImplementedError

    def normed(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def packed(kind: str, seed: int) -> PackedDelta:
    return pack(methods.lower(random_delta(SPEC, kind, seed), SPEC), SPEC, torch.float32)


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
def test_poison_keeps_to_its_rows(mode: Mode) -> None:
    torch.manual_seed(0)
    ops = Ops(len(site_groups(SPEC)), torch.device("cpu"), torch.float32, mode)
    good, bad, other = packed("lora", 1), packed("lora", 2), packed("bitfit", 3)
    clean = packed("lora", 2)
    bad.arena.fill_(3e38)
    x, y = torch.randn(8, SPEC.hidden), torch.randn(8, PLACE.group.out_features)
    results = []
    for delta in (bad, clean):
        segments = [Segment(0, 2, good), Segment(2, 3, delta), Segment(5, 2, other)]
        plan = ops.plan(segments, 8)
        assert plan is not None
        out = y.clone()
        plan.apply(PLACE.group.index, x, out, Linear())
        results.append(out)
    poisoned, healthy = results
    assert not torch.isfinite(poisoned[2:5]).all()
    for rows in (slice(0, 2), slice(5, 8)):
        assert torch.equal(poisoned[rows], healthy[rows])


def test_values_that_the_dtype_cannot_hold_are_refused() -> None:
    delta = random_delta(SPEC, "lora", 1, size=1e5)
    with pytest.raises(InvalidDelta, match="float16"):
        pack(methods.lower(delta, SPEC), SPEC, torch.float16)
