"""A residency over a tiny backbone's sites, whose loaders can be waited for, and small deltas for it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltas.backbones import describe
from deltas.bank import PackedDelta
from deltas.delta import Component, Delta
from deltas.formats import native
from deltas.sites import BackboneSpec, SiteKind
from server.engine.loaders import LoadFailure
from server.engine.residency import Residency
from server.types import DeltaPart, DeltaRef
from tests.tiny import llama_config

SPEC: BackboneSpec = describe(llama_config(), "test")


def lora(rank: int, seed: int) -> Delta:
    make = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in SPEC.of_kind(SiteKind.LINEAR):
        if site.name.endswith("attn.q"):
            tensors[f"{site.name}/A"] = torch.randn(rank, site.in_features, generator=make)
            tensors[f"{site.name}/B"] = torch.randn(site.out_features, rank, generator=make)
    return Delta((Component("lora", {"scale": 1.0}, tensors),))


class Tiers:
    """A residency whose loaders can be waited for."""

    def __init__(
        self, folder: Path, *, device_bytes: int, host_bytes: int = 1 << 30, pinned_share: float = 0.5
    ) -> None:
        self.folder = folder
        self.woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.left: list[PackedDelta] = []
        self.it = Residency(
            SPEC,
            torch.float32,
            torch.device("cpu"),
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            pinned_share=pinned_share,
            finish=lambda delta: delta,
            forget=self.left.append,
            wake=lambda: self.woken.put(None),
        )

    def ref(self, rank: int, seed: int) -> DeltaRef:
        delta = lora(rank, seed)
        path = self.folder / f"{delta.digest}.safetensors"
        native.save(delta, path)
        return DeltaRef(delta.digest, str(path))

    def fetched(self, *refs: DeltaRef) -> list[LoadFailure]:
        """Reads these from disk and takes them in, as the next step would."""
        for ref in refs:
            self.it.prefetch(ref)
        for _ in refs:
            self.woken.get(timeout=30)
        return self.it.collect()

    def use(self, ref: DeltaRef) -> bool:
        """What a step does for a row: asks, and if the answer is the delta, acquires it."""
        if self.it.resident(ref) is None:
            return False
        self.it.acquire(ref.digest)
        return True


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Tiers]]:
    made: list[Tiers] = []

    def start(**budgets: Any) -> Tiers:
        made.append(Tiers(tmp_path, **budgets))
        return made[-1]

    yield start
    for tiers in made:
        tiers.it.close()


def sum_of(*refs: DeltaRef, weight: float = 0.5) -> DeltaRef:
    return DeltaRef.of_sum(DeltaPart(ref.digest, ref.path, weight) for ref in refs)


def size_of(make: Callable[..., Tiers], rank: int) -> int:
    tiers = make(device_bytes=1 << 30)
    ref = tiers.ref(rank, 99)
    assert not tiers.fetched(ref)
    assert tiers.use(ref)
    return tiers.it.bytes_on_device
