"""The Triton plan against ``ops/reference.py``: ranks, mixed kinds, ragged segments, chains, poison, fixed launches.

Through Triton's interpreter where there is no GPU, on the device where there is one.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from deltas.bank import Applied, PackedDelta, Placed, SitePatch
from deltas.batch import Segment
from deltas.ops import Ops
from deltas.ops.table import DeltaTables
from deltas.ops.triton_kernels import INTERPRETED
from deltas.ops.triton_plan import Room, StaticPlan, Units
from deltas.patches import Activation, BlockInput, Mix
from deltas.tensors import map_tensors
from tests.unit.ops.checks import DTYPES, bits, close
from tests.unit.ops.test_poison import Linear

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FACTOR = (
    4  # the interpreter cuts bfloat16 off instead of rounding it; the device rounds between the two products
)
GROUPS = 3
LINEAR, BLOCK, IDLE = range(GROUPS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape) / max(1, shape[-1]) ** 0.5).to(dtype).to(DEVICE)


def low_rank(dtype: torch.dtype, out0: int, out: int, width: int, rank: int, **more: Tensor) -> SitePatch:
    return SitePatch(out0, out, down=tensor(dtype, rank, width), up=tensor(dtype, rank, out), **more)


def bottleneck(
    dtype: torch.dtype, width: int, rank: int, activation: Activation, reads: BlockInput
) -> SitePatch:
    return SitePatch(
        0, width, down=tensor(dtype, rank, width), down_bias=tensor(dtype, rank), up=tensor(dtype, rank, width),
        shift=tensor(dtype, width), activation=activation, reads=reads,
    )  # fmt: skip


def delta(dtype: torch.dtype, steps: dict[int, tuple[Applied, ...]]) -> PackedDelta:
    return PackedDelta(torch.zeros(1, dtype=dtype, device=DEVICE), steps)


def compare(
    segments: list[Segment], tokens: int, dtype: torch.dtype, widths: dict[int, tuple[int, int]]
) -> None:
    """The segments at each group of ``widths`` (in, out), and that base rows and other groups are not touched."""
    plan = Ops(GROUPS, DEVICE, dtype, "triton").plan(segments, tokens)
    truth = Ops(GROUPS, DEVICE, torch.float32, "reference").plan([wide(s) for s in segments], tokens)
    assert plan is not None
    assert truth is not None
    assert [plan.active(group) for group in range(GROUPS)] == [group in widths for group in range(GROUPS)]
    for group, (width, out) in widths.items():
        x, y = tensor(dtype, tokens, width), tensor(dtype, tokens, out)
        before, want = y.clone(), y.float()
        plan.apply(group, x, y, Linear())
        truth.apply(group, x.float(), want, Linear())
        close(y, want, FACTOR)
        base = torch.ones(tokens, dtype=torch.bool)
        for segment in segments:
            if segment.delta is not None and group in segment.delta.patches:
                base[segment.slice] = False
        assert torch.equal(bits(y[base.to(DEVICE)]), bits(before[base.to(DEVICE)]))


def wide(segment: Segment) -> Segment:
    """The same segment, its delta in float32."""
    if segment.delta is None:
        return segment
    changed = map_tensors(segment.delta.patches, lambda t: t.float() if t.is_floating_point() else t)
    return Segment(segment.row0, segment.rows, delta(torch.float32, changed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 64])
def test_one_rank(dtype: torch.dtype, rank: int) -> None:
    width, out = 80, 70
    only = delta(dtype, {LINEAR: (low_rank(dtype, 0, out, width, rank),)})
    compare([Segment(1, 3, only)], 5, dtype, {LINEAR: (width, out)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_mixed_kinds_and_ragged_segments(dtype: torch.dtype, seed: int) -> None:
    """Every kind beside every other and beside base rows, at fused linears and at blocks, more tokens than a unit."""
    random_ = random.Random(seed)
    width, outs, hidden = 150, (64, 32, 35), 96
    segments: list[Segment] = []
    row = 0
    for rank in random_.sample(range(1, 65), 6):
        steps: list[Applied] = []
        out0 = 0
        for out in outs:
            match random_.randrange(4):
                case 0:
                    steps.append(SitePatch(out0, out, gain=tensor(dtype, out)))
                case 1:
                    steps.append(SitePatch(out0, out, shift=tensor(dtype, out)))
                case 2:
                    more = {"gain": tensor(dtype, out), "shift": tensor(dtype, out)}
                    steps.append(low_rank(dtype, out0, out, width, rank, **more))
                case _:
                    steps.append(low_rank(dtype, out0, out, width, 65 - rank))
            out0 += out
        activation = random_.choice(list(Activation))
        reads = random_.choice([BlockInput.OUTPUT, BlockInput.OUTPUT_AND_RESIDUAL, BlockInput.RESIDUAL])
        block = (bottleneck(dtype, hidden, rank, activation, reads),)
        patches: dict[int, tuple[Applied, ...]] = {LINEAR: tuple(steps), BLOCK: block}
        rows = random_.choice([1, 1, 2, 16, 17, 35])
        segments += [Segment(row, rows, delta(dtype, patches)), Segment(row + rows, 1, None)]
        row += rows + 1
    compare(segments, row, dtype, {LINEAR: (width, sum(outs)), BLOCK: (hidden, hidden)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
def test_activations(dtype: torch.dtype, activation: Activation) -> None:
    steps = tuple(
        bottleneck(dtype, 64, 12, activation, reads) for reads in (BlockInput.OUTPUT, BlockInput.RESIDUAL)
    )
    segments = [Segment(i * 2, 2, delta(dtype, {BLOCK: (step,)})) for i, step in enumerate(steps)]
    compare(segments, 4, dtype, {BLOCK: (64, 64)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_read_in_parts(dtype: torch.dtype) -> None:
    only = delta(dtype, {LINEAR: (low_rank(dtype, 0, 16, 2100, 4),)})
    compare([Segment(0, 2, only)], 2, dtype, {LINEAR: (2100, 16)})


def test_chains_apply_in_order() -> None:
    dtype = torch.float32
    chain = tuple(
        bottleneck(dtype, 48, rank, Activation.TANH, BlockInput.OUTPUT) for rank in (4, 9, 3)
    )  # each reads what the one before left
    segments = [
        Segment(0, 20, delta(dtype, {BLOCK: chain})),
        Segment(20, 2, delta(dtype, {BLOCK: chain[:1]})),
    ]
    compare(segments, 22, dtype, {BLOCK: (48, 48)})


def test_steps_beyond_the_kernels_and_long_segments_go_other_ways() -> None:
    dtype = torch.float32
    mix = Mix("", tensor(dtype, 32), tensor(dtype, 32), torch.randperm(32).to(DEVICE))
    looped = delta(dtype, {LINEAR: (Placed(0, 32, mix), low_rank(dtype, 0, 32, 48, 2))})
    long = delta(dtype, {LINEAR: (low_rank(dtype, 0, 32, 48, 64),)})
    compare([Segment(0, 2, looped), Segment(2, 130, long)], 132, dtype, {LINEAR: (48, 32)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_a_batch_and_keeps_its_poison(dtype: torch.dtype) -> None:
    ops = Ops(GROUPS, DEVICE, dtype, "triton")
    members = [delta(dtype, {LINEAR: (low_rank(dtype, 0, 40, 64, rank),)}) for rank in (3, 20)]
    segments = [Segment(0, 5, members[0]), Segment(5, 3, members[1])]
    x, y = tensor(dtype, 8, 64), tensor(dtype, 8, 40)
    x[2, 7] = float("nan")
    together, plan = y.clone(), ops.plan(segments, 8)
    assert plan is not None
    plan.apply(LINEAR, x, together, Linear())
    assert together[2].isnan().all()
    for row in (0, 1, 3, 4, 5, 6, 7):
        alone, plan = y.clone(), ops.plan([Segment(row, 1, members[row >= 5])], 8)
        assert plan is not None
        plan.apply(LINEAR, x, alone, Linear())
        assert torch.equal(bits(alone[row]), bits(together[row]))
        assert together[row].isfinite().all()


def test_a_static_plan_serves_every_composition_that_it_holds() -> None:
    dtype, tables = torch.float32, DeltaTables(GROUPS)
    static = StaticPlan({LINEAR: Room(8, 40, False), BLOCK: Room(4, 48, True)}, rank=32, device=DEVICE)
    members = [
        delta(dtype, {LINEAR: (low_rank(dtype, 0, 30, 64, 20), low_rank(dtype, 30, 10, 64, 1))}),
        delta(dtype, {BLOCK: (bottleneck(dtype, 48, 32, Activation.GELU, BlockInput.OUTPUT),)}),
        delta(dtype, {LINEAR: (SitePatch(0, 30, gain=tensor(dtype, 30)),)}),
    ]
    inputs = {LINEAR: (tensor(dtype, 6, 64), 40), BLOCK: (tensor(dtype, 6, 48), 48)}
    for chosen in ([0, 1, 2], [2], [], [1, 0], [0, 0, 0, 0]):
        segments = [Segment(i, 1, members[j]) for i, j in enumerate(chosen)]
        units = Units.of(tables, segments)
        assert static.holds(units)
        static.load(units)
        eager = Ops(GROUPS, DEVICE, dtype, "triton").plan(segments, 6)
        for group, (x, out) in inputs.items():
            y = tensor(dtype, 6, out)
            want = y.clone()
            static.apply(group, x, y, Linear())
            if eager is not None and eager.active(group):
                eager.apply(group, x, want, Linear())
            assert torch.equal(bits(y), bits(want))


def test_what_a_static_plan_does_not_hold() -> None:
    dtype, tables = torch.float32, DeltaTables(GROUPS)
    static = StaticPlan({LINEAR: Room(2, 48, True)}, rank=16, device=DEVICE)
    too_wide = delta(dtype, {LINEAR: (low_rank(dtype, 0, 48, 8, 17),)})
    too_many = delta(dtype, {LINEAR: (low_rank(dtype, 0, 48, 8, 1),)})
    elsewhere = delta(dtype, {BLOCK: (SitePatch(0, 8, shift=tensor(dtype, 8)),)})
    chain = delta(dtype, {LINEAR: (SitePatch(0, 16, shift=tensor(dtype, 16)),) * 2})
    broad = delta(dtype, {LINEAR: (SitePatch(0, 64, shift=tensor(dtype, 64)),)})
    odd = delta(dtype, {LINEAR: (SitePatch(0, 8, shift=tensor(dtype, 8)),)})
    for one in (too_wide, elsewhere, chain, broad, odd):
        assert not static.holds(Units.of(tables, [Segment(0, 1, one)]))
    assert not static.holds(Units.of(tables, [Segment(i, 1, too_many) for i in range(3)]))
