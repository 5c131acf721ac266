"""The step loop as a whole, in this process: what goes in as messages comes out as messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deltas.delta import Component, Delta
from deltas.sites import BackboneSpec, SiteKind
from server.engine.messages import Cancel, Drop, Load
from server.types import DeltaRef
from tests.tiny import KINDS, random_delta
from tests.unit.engine.running import Harness, harnesses


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    with harnesses(tmp_path / "tiny") as start:
        yield start


def poisonous(spec: BackboneSpec) -> Delta:
    """Finite numbers that overflow once multiplied."""
    tensors = {}
    for site in spec.of_kind(SiteKind.LINEAR):
        if site.name != "head":
            tensors[f"{site.name}/A"] = torch.full((2, site.in_features), 1e25)
            tensors[f"{site.name}/B"] = torch.full((site.out_features, 2), 1e25)
    return Delta((Component("lora", {"scale": 1.0}, tensors),))


def prompt_of(row: int) -> list[int]:
    return [3 + (row * 37 + i * 11) % 250 for i in range(1 + row * 7 % 40)]


def test_mixed_kinds_equal_solo_through_admission_and_chunks(make: Callable[..., Harness]) -> None:
    mixed = make()
    spec = mixed.engine.runner.backbone.spec
    refs = [None, *(mixed.save(random_delta(spec, kind, seed)) for kind in KINDS for seed in (1, 2, 3))]
    for row, ref in enumerate(refs):  # more rows than slots, prompts longer than a chunk
        mixed.submit(row, prompt_of(row), ref)
    mixed.wait(*range(len(refs)))
    solo = make(max_rows=1, prefill_tokens=1000)
    for row, ref in enumerate(refs):
        solo.submit(row, prompt_of(row), ref)
        solo.wait(row)
    answers = [tuple(mixed.tokens(row)) for row in range(len(refs))]
    assert answers == [tuple(solo.tokens(row)) for row in range(len(refs))]
    assert len(set(answers)) > len(refs) // 2, "deltas do not seem to matter"
    mixed.engine.scheduler.check_integrity()


def test_cancel_frees_the_row_and_its_delta(make: Callable[..., Harness]) -> None:
    engine = make(max_rows=1)
    ref = engine.save(random_delta(engine.engine.runner.backbone.spec, "lora", 1))
    engine.submit(1, [5, 6, 7], ref, max_tokens=200)
    engine.submit(2, [5, 6, 7])
    engine.engine.receive(Cancel(1))
    engine.wait(2)
    assert 1 not in engine.ends
    engine.engine.receive(Drop(ref.digest))
    engine.submit(3, [5])
    engine.wait(3)
    assert engine.engine.residency.count_on_device == engine.engine.residency.count_on_host == 0


def test_a_missing_or_damaged_delta_fails_its_rows_only(make: Callable[..., Harness]) -> None:
    engine = make()
    spec = engine.engine.runner.backbone.spec
    good = engine.save(random_delta(spec, "lora", 1))
    damaged = engine.save(random_delta(spec, "lora", 2))
    content = bytearray(Path(damaged.path).read_bytes())
    content[-3] ^= 0x40
    Path(damaged.path).write_bytes(content)
    engine.submit(1, [5, 6], DeltaRef("0" * 64, str(engine.folder / "nowhere")))
    engine.submit(2, [5, 6], damaged)
    engine.submit(3, [5, 6], good)
    engine.submit(4, [5, 6])
    engine.wait(1, 2, 3, 4)
    assert engine.ends == {1: "row_failed", 2: "row_failed", 3: "length", 4: "length"}


def test_a_poisoned_delta_fails_its_row_and_leaves_its_neighbours_bit_identical(
    make: Callable[..., Harness],
) -> None:
    engine = make()
    spec = engine.engine.runner.backbone.spec
    good = engine.save(random_delta(spec, "lora", 1))
    poison = engine.save(poisonous(spec))
    harmless = engine.save(random_delta(spec, "lora", 4))
    engine.engine.receive(Load(90, poison))
    engine.engine.receive(Load(91, good))
    engine.engine.receive(Load(92, harmless))
    engine.wait(90, 91, 92)
    for row, ref in ((1, good), (2, poison), (3, None)):
        engine.submit(row, [5, 6, 7], ref, logprobs=3)
    engine.wait(1, 2, 3)
    assert engine.ends[2] == "row_failed"
    for row, ref in ((11, good), (12, harmless), (13, None)):
        engine.submit(row, [5, 6, 7], ref, logprobs=3)
    engine.wait(11, 12, 13)
    for poisoned, clean in ((1, 11), (3, 13)):
        assert engine.events[poisoned][0] == engine.events[clean][0]
        assert engine.tokens(poisoned) == engine.tokens(clean)
    engine.wait_stats(lambda stats: list(stats.quarantined) == [poison.digest])


def test_more_deltas_than_the_device_holds(make: Callable[..., Harness]) -> None:
    wide = make()
    spec = wide.engine.runner.backbone.spec
    refs = [wide.save(random_delta(spec, "lora", seed)) for seed in range(12)]
    for row, ref in enumerate(refs):
        wide.submit(row, [9, 8, 7], ref)
    wide.wait(*range(len(refs)))
    size = wide.engine.residency.bytes_on_device // len(refs)
    tight = make(delta_bytes=max(1, int(2.5 * size)), host_delta_bytes=4 * size)
    for turn in range(2):
        for row, ref in enumerate(refs):
            tight.submit(100 * turn + row, [9, 8, 7], ref)
    tight.wait(*range(len(refs)), *range(100, 100 + len(refs)))
    for row in range(len(refs)):
        assert tight.tokens(row) == tight.tokens(100 + row) == wide.tokens(row)
    assert tight.engine.residency.bytes_on_device <= 2.5 * size


def test_limits_and_ends(make: Callable[..., Harness]) -> None:
    engine = make(max_model_len=32)
    engine.submit(1, list(range(3, 40)))
    engine.submit(2, [5, 6], max_tokens=1000)
    engine.submit(3, [5, 6], max_tokens=0, prompt_logprobs=2)
    engine.submit(4, [5, 6], logit_bias={100000: 1.0})
    engine.submit(5, [5, 6], stop_token_ids=list(range(260)))
    engine.wait(1, 2, 3, 4, 5)
    assert engine.ends == {
        1: "context_length_exceeded",
        2: "length",
        3: "length",
        4: "invalid_request",
        5: "stop",
    }
    assert len(engine.tokens(2)) == 30
    (only,) = engine.events[3]
    assert only.prompt_logprobs is not None
    assert only.prompt_logprobs[0] is None
    assert only.prompt_logprobs[1] is not None
    assert only.prompt_logprobs[1].token == 6


def test_a_soft_prompt_longer_than_a_slot_is_refused_and_hurts_nobody(make: Callable[..., Harness]) -> None:
    engine = make(max_model_len=32)
    long = Delta((Component("prompt", {}, {"embeddings": torch.ones(100, 64)}),))
    engine.engine.receive(Load(1, engine.save(long)))
    engine.submit(2, [5, 6])
    engine.wait(1, 2)
    assert engine.ends == {1: "invalid_delta", 2: "length"}


def test_a_deleted_delta_can_be_quarantined_again(make: Callable[..., Harness]) -> None:
    engine = make()
    poison = engine.save(poisonous(engine.engine.runner.backbone.spec))
    for row in (1, 2):
        engine.submit(row, [5, 6], poison)
        engine.submit(row + 10, [7])
        engine.wait(row, row + 10)
        engine.wait_stats(lambda stats: list(stats.quarantined) == [poison.digest])
        engine.engine.receive(Drop(poison.digest))
        engine.submit(row + 20, [7])
        engine.wait(row + 20)
        engine.wait_stats(lambda stats: not stats.quarantined)


def test_a_delta_just_tried_gives_way_to_a_row_that_waits(make: Callable[..., Harness]) -> None:
    """The engine must not fall asleep on a row that found the room taken in the step of the trial."""
    wide = make()
    deltas = [random_delta(wide.engine.runner.backbone.spec, "lora", seed) for seed in (5, 10)]
    refs = [wide.save(delta) for delta in deltas]
    wide.submit(0, [5], refs[0])
    wide.wait(0)
    engine = make(delta_bytes=wide.engine.residency.bytes_on_device + 64)
    for n in range(20):
        engine.engine.receive(Load(100 + n, refs[n % 2]))
        engine.submit(n, [5, 6], refs[(n + 1) % 2], max_tokens=1)
        engine.wait(n, 100 + n)
    assert engine.messages == {}
