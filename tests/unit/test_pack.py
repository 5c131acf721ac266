"""Packing: order of steps where a fused linear and its parts are changed, and what has no order."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from deltas.backbones import describe
from deltas.bank import SitePatch
from deltas.compose import combine
from deltas.errors import UnsupportedDelta
from deltas.pack import pack
from deltas.patches import Gain, KVPrefix, LowRank, Override
from tests.oracle.padded import BACKBONES

SPEC = describe(AutoConfig.from_pretrained(BACKBONES / "gpt2"), "test")
WHOLE, PART = "layers.0.attn.qkv", "layers.0.attn.q"


def test_a_parts_gain_comes_before_what_is_added_to_the_whole() -> None:
    added = LowRank(WHOLE, torch.randn(2, 32), torch.randn(2, 96))
    packed = pack([added, Gain(PART, torch.rand(32), multiplies=True)], SPEC, torch.float32)
    ((gain, low_rank),) = packed.patches.values()
    assert isinstance(gain, SitePatch)
    assert isinstance(low_rank, SitePatch)
    assert gain.gain is not None
    assert (gain.out0, gain.out) == (0, 32)
    assert low_rank.rank == 2


def test_two_transforms_of_the_same_columns_are_refused() -> None:
    whole = Override(WHOLE, torch.zeros(96, 32), None)
    with pytest.raises(UnsupportedDelta, match="no agreed order"):
        pack([whole, Gain(PART, torch.rand(32), multiplies=True)], SPEC, torch.float32)


def test_parts_beside_one_another_share_a_step_list() -> None:
    parts = [LowRank(f"layers.0.attn.{p}", torch.randn(2, 32), torch.randn(2, 32)) for p in "qkv"]
    packed = pack(parts, SPEC, torch.float32)
    (steps,) = packed.patches.values()
    assert [step.out0 for step in steps] == [0, 32, 64]
    assert not packed.looped


def test_two_prefixes_that_shift_positions_are_refused_for_that_reason() -> None:
    prefix = KVPrefix("layers.0.attn.kv", torch.rand(2, 4, 8), torch.rand(2, 4, 8), shifts_positions=True)
    with pytest.raises(UnsupportedDelta, match="both shift the positions"):
        combine([[prefix], [prefix]])
    still = KVPrefix("layers.0.attn.kv", torch.rand(3, 4, 8), torch.rand(3, 4, 8), shifts_positions=False)
    assert len(combine([[prefix], [still]])) == 2
    (joined,) = combine([[still], [still]])
    assert isinstance(joined, KVPrefix)
    assert len(joined.keys) == 6
