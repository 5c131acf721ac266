"""Placements beside running rows: answered when the delta is there, or at once when there is no room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from server.engine.messages import Pin, Place, Where
from server.types import DeltaRef
from tests.tiny import random_delta
from tests.unit.engine.running import Harness, harnesses


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Harness]]:
    with harnesses(tmp_path_factory.mktemp("backbone")) as start:
        yield start


def loras(engine: Harness, count: int) -> list[tuple[DeltaRef, int]]:
    """Deltas and their bytes on the device, smallest first, of an engine that has room for them."""
    spec = engine.engine.runner.backbone.spec
    refs = [engine.save(random_delta(spec, "lora", seed)) for seed in range(count)]
    for number, ref in enumerate(refs):
        engine.engine.receive(Place(number, ref, "device", None))
    engine.wait(*range(count))
    sizes = [engine.residences[number].bytes for number in range(count)]
    return sorted(zip(refs, sizes, strict=True), key=lambda found: found[1])


def test_no_room_is_said_at_once(make: Callable[..., Harness]) -> None:
    (a, size), (b, larger) = loras(make(), 2)
    engine = make(delta_bytes=size + larger - 1, max_model_len=256)
    engine.submit(1, [5, 6, 7], a, max_tokens=200)
    engine.wait_begun(1)
    engine.engine.receive(Place(2, b, "device", None))
    engine.wait(2)
    assert engine.ends[2] == "conflict"
    assert f"running rows {size}" in engine.messages[2]
    engine.engine.receive(Place(3, b, "host", None))
    engine.engine.receive(Where(4, b.digest))
    engine.wait(3, 4, 1)
    assert engine.residences[3].tier == engine.residences[4].tier == "host"
    engine.engine.receive(Place(5, b, "device", None))  # the row is done
    engine.wait(5)
    assert engine.residences[5].tier == "device"


def test_a_pin_holds_against_rows_and_is_bounded(make: Callable[..., Harness]) -> None:
    (a, size), (c, _), (b, largest) = loras(make(), 3)
    engine = make(delta_bytes=2 * (size + largest - 1), pinned_delta_share=0.5)
    engine.engine.receive(Place(1, a, "device", "device"))
    engine.wait(1)
    engine.engine.receive(Place(2, b, "device", "device"))
    engine.wait(2)
    assert engine.residences[1].tier == "device"
    assert engine.ends[2] == "conflict"
    assert "--pinned-delta-share" in engine.messages[2]
    for row, ref in enumerate((b, c, b, c), start=10):
        engine.submit(row, [5, 6, 7], ref)
    engine.wait(10, 11, 12, 13)
    engine.engine.receive(Where(3, a.digest))
    engine.engine.receive(Pin(a.digest, None))
    engine.engine.receive(Place(4, a, "disk", None))
    engine.engine.receive(Place(5, b, "device", "device"))
    engine.wait(3, 4, 5)
    assert [engine.residences[n].tier for n in (3, 4, 5)] == ["device", "disk", "device"]


def test_what_cannot_be_read_is_said(make: Callable[..., Harness]) -> None:
    engine = make()
    engine.engine.receive(Place(1, DeltaRef("0" * 64, str(engine.folder / "nothing")), "host", "host"))
    engine.wait(1)
    assert engine.ends[1] == "invalid_delta"
