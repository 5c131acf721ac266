"""Sums of deltas in the engine: loaded from their parts' files, refused where they have no meaning, gone with a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deltas.delta import Component, Delta
from server.engine.messages import Drop, Load
from server.engine.quarantine import MOST_SUMS, Quarantine
from server.types import DeltaPart, DeltaRef
from tests.tiny import random_delta
from tests.unit.engine.running import Harness, harnesses

PROMPT = [5, 6, 7]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Harness]:
    with harnesses(tmp_path / "tiny") as start:
        yield start()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    with harnesses(tmp_path / "tiny") as start:
        yield start


def random(engine: Harness, kind: str, seed: int) -> DeltaRef:
    return engine.save(random_delta(engine.engine.runner.backbone.spec, kind, seed))


def sum_of(*terms: tuple[DeltaRef, float]) -> DeltaRef:
    return DeltaRef.of_sum(DeltaPart(ref.digest, ref.path, weight) for ref, weight in terms)


def large_lora(engine: Harness) -> DeltaRef:
    """Finite by itself; a hundred times as large it overflows."""
    site = engine.engine.runner.backbone.spec.sites["layers.1.mlp.down"]
    tensors = {
        f"{site.name}/A": torch.full((2, site.in_features), 1e18),
        f"{site.name}/B": torch.full((site.out_features, 2), 1e18),
    }
    return engine.save(Delta((Component("lora", {"scale": 1.0}, tensors),)))


def test_a_sum_of_all_kinds_is_served_beside_its_parts(make: Callable[..., Harness]) -> None:
    mixed, alone = make(), make(max_rows=1)
    parts = [random(mixed, kind, 1) for kind in ("lora", "bitfit", "prompt", "bottleneck")]
    whole = sum_of((parts[0], 0.7), (parts[1], 0.3), (parts[2], 1.0), (parts[3], -0.5))
    refs = [None, *parts, whole, sum_of((parts[0], 0.7)), sum_of((parts[0], 1.0), (parts[0], 1.0))]
    for row, ref in enumerate(refs):
        mixed.submit(row, PROMPT, ref, logprobs=1)
    mixed.wait(*range(len(refs)))
    for row, ref in enumerate(refs):
        alone.submit(row, PROMPT, ref, logprobs=1)
        alone.wait(row)
        assert mixed.tokens(row) == alone.tokens(row)
    assert len({str(mixed.events[row][0].logprobs) for row in range(len(refs))}) == len(refs)


def test_what_has_no_meaning_is_refused_with_the_reason(engine: Harness) -> None:
    one, two, lora = random(engine, "prompt", 1), random(engine, "prompt", 2), random(engine, "lora", 1)
    spec = engine.engine.runner.backbone.spec
    huge = engine.save(Delta((Component("bitfit", {}, {"norm/beta": torch.full((spec.hidden,), 1e38)}),)))
    refused = {
        1: (sum_of((one, 1.0), (two, 1.0)), "both shift the positions"),
        2: (sum_of((lora, 1.0), (one, 0.5)), "no exact multiple"),
        3: (sum_of((lora, 1.0), (huge, 100.0)), "beta at norm overflows float32"),
    }
    for row, (ref, _) in refused.items():
        engine.submit(row, PROMPT, ref)
        engine.engine.receive(Load(10 + row, ref))
    engine.submit(20, PROMPT, lora)
    engine.wait(*refused, *(10 + row for row in refused), 20)
    for row, (_, reason) in refused.items():
        for end in (row, 10 + row):
            assert engine.ends[end] == "invalid_composition"
            assert reason in engine.messages[end]
    assert engine.ends[20] == "length"
    assert engine.engine.residency.counts.failures == 3
    for row, (ref, _) in refused.items():  # and again
        engine.submit(100 + row, PROMPT, ref)
    engine.wait(*(100 + row for row in refused))
    assert {engine.ends[100 + row] for row in refused} == {"invalid_composition"}


def test_a_sum_larger_than_the_device_is_refused_and_its_parts_are_not(make: Callable[..., Harness]) -> None:
    wide = make()
    parts = [random(wide, "lora", seed) for seed in range(4)]
    for row, part in enumerate(parts):
        wide.submit(row, PROMPT, part)
    wide.wait(*range(4))
    engine = make(delta_bytes=wide.engine.residency.bytes_on_device * 2 // 3)
    for row, part in enumerate(parts):
        engine.submit(row, PROMPT, part)
    engine.submit(9, PROMPT, sum_of(*((part, 1.0) for part in parts)))
    engine.wait(0, 1, 2, 3, 9)
    assert engine.ends == {0: "length", 1: "length", 2: "length", 3: "length", 9: "invalid_composition"}
    assert "--delta-bytes" in engine.messages[9]


def test_every_part_is_verified(engine: Harness) -> None:
    """A damaged or missing file is the server's fault, not the sum's."""
    good, damaged = random(engine, "lora", 1), random(engine, "lora", 2)
    content = bytearray(Path(damaged.path).read_bytes())
    content[-3] ^= 0x40
    Path(damaged.path).write_bytes(content)
    swapped = DeltaRef(damaged.digest, good.path)  # a sound file, but another delta's
    missing = DeltaRef("0" * 64, str(engine.folder / "nowhere"))
    for row, bad in enumerate((damaged, swapped, missing)):
        engine.submit(row, PROMPT, sum_of((good, 0.5), (bad, 1.0 + row)))
    engine.submit(9, PROMPT, sum_of((good, 0.5)))
    engine.wait(0, 1, 2, 9)
    assert engine.ends == {0: "row_failed", 1: "row_failed", 2: "row_failed", 9: "length"}
    assert "are damaged" in engine.messages[1]


def test_a_part_that_does_not_fit_the_backbone_is_not_the_sum_s_fault(engine: Harness) -> None:
    site = "layers.0.attn.q"
    alien = engine.save(
        Delta(
            (
                Component(
                    "lora", {"scale": 1.0}, {f"{site}/A": torch.ones(2, 7), f"{site}/B": torch.ones(7, 2)}
                ),
            )
        )
    )
    engine.submit(1, PROMPT, sum_of((alien, 0.5)))
    engine.wait(1)
    assert engine.ends[1] == "row_failed"


def test_a_poisoned_sum_is_refused_from_then_on_and_quarantines_no_part(engine: Harness) -> None:
    large, other = large_lora(engine), random(engine, "bitfit", 1)
    poison = sum_of((large, 100.0), (other, 1.0))
    rows = {1: large, 2: other, 3: poison, 4: sum_of((large, 1.0), (other, 1.0))}
    for row, ref in rows.items():
        engine.submit(row, PROMPT, ref)
    engine.wait(*rows)
    assert engine.ends == {1: "length", 2: "length", 3: "row_failed", 4: "length"}
    assert "sum of deltas is quarantined" in engine.messages[3]
    for row, ref in rows.items():
        engine.submit(10 + row, PROMPT, ref)
    engine.wait(*(10 + row for row in rows))
    assert [engine.ends[10 + row] for row in rows] == ["length", "length", "delta_quarantined", "length"]
    engine.stats = None
    engine.submit(20, PROMPT)
    engine.wait_stats(lambda stats: stats.rows_running == 0 and not stats.quarantined)
    # deleting a part takes the memory of it away too: the same content may come back
    engine.engine.receive(Drop(large.digest))
    engine.submit(30, PROMPT, poison)
    engine.wait(30)
    assert engine.ends[30] == "row_failed"


def test_deleting_a_part_takes_its_sums_out_of_memory(engine: Harness) -> None:
    a, b, c = (random(engine, "lora", seed) for seed in (1, 2, 3))
    kept, gone = sum_of((b, 0.5), (c, 0.5)), [sum_of((a, 0.5), (b, 0.5)), sum_of((a, 2.0))]
    refs = [a, b, kept, *gone]
    for row, ref in enumerate(refs):
        engine.submit(row, PROMPT, ref)
    engine.wait(*range(len(refs)))
    tiers = engine.engine.residency
    assert tiers.count_on_device == tiers.count_on_host == 5
    Path(a.path).unlink()
    engine.engine.receive(Drop(a.digest))
    for row, ref in enumerate(refs):
        engine.submit(10 + row, PROMPT, ref)
    engine.wait(*(10 + row for row in range(len(refs))))
    assert tiers.count_on_device == tiers.count_on_host == 2
    ends = [engine.ends[10 + row] for row in range(len(refs))]
    assert ends == ["row_failed", "length", "length", "row_failed", "row_failed"]


def test_a_running_sum_outlives_its_part(engine: Harness) -> None:
    a, b = random(engine, "lora", 1), random(engine, "bitfit", 2)
    whole = sum_of((a, 0.5), (b, 0.5))
    engine.submit(1, PROMPT, whole)
    engine.wait(1)
    engine.submit(2, PROMPT, whole, max_tokens=200)
    engine.submit(3, PROMPT)
    engine.wait(3)
    Path(a.path).unlink()
    engine.engine.receive(Drop(a.digest))
    engine.wait(2)
    assert engine.ends[2] == "length"
    assert engine.tokens(2)[:8] == engine.tokens(1)
    engine.submit(4, PROMPT)
    engine.wait(4)
    assert engine.engine.residency.count_on_device == engine.engine.residency.count_on_host == 0


def test_the_memory_of_poisoned_sums_is_bounded() -> None:
    quarantine = Quarantine()
    refs = [sum_of((DeltaRef("a", "x"), 1 + n / 7)) for n in range(MOST_SUMS + 1)]
    for ref in refs:
        quarantine.add(ref, "why not")
    assert not quarantine.refuses(refs[0])
    assert all(quarantine.refuses(ref) for ref in refs[1:])
    quarantine.forget("a")
    assert not any(quarantine.refuses(ref) for ref in refs)
