"""An encoder's engine on a thread: rows of different deltas at once, faults that stay where they are, full tiers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltas import heads, methods
from deltas.delta import Component, Delta
from deltas.formats import native
from deltas.pack import pack
from deltas.weights import FrozenTensors
from server.engine import backbone as backbones
from server.engine.build import build
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.encoder_engine import EncoderEngine
from server.engine.messages import Cancel, Drop, Encode, Encoded, Failed, Load, Loaded, Reply, Stats, Submit
from server.engine.process import EngineConfig
from server.types import DeltaPart, DeltaRef, EncoderInput, EngineStats, SamplingParams, Want
from tests.deltas_of_every_kind import make, served
from tests.encoders import write_encoder
from tests.tiny import random_delta


class Harness:
    """An engine on a thread, and what it said, by row."""

    def __init__(self, folder: Path, scratch: Path, **changes: object) -> None:
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        settings = {
            "backbone": str(folder),
            "backbone_name": None,
            "data_dir": str(scratch),
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": None,
            "max_rows": 6,
            "max_waiting": 100,
            "prefill_tokens": 32,
            "kv_bytes": None,
            "delta_bytes": 1 << 24,
            "host_delta_bytes": 1 << 24,
            "threads": 1,
        }
        engine = build(EngineConfig(**(settings | changes)), self._replies.put)
        assert isinstance(engine, EncoderEngine)
        self.engine = engine
        self.scratch = scratch
        self.vectors: dict[int, Tensor] = {}
        self.failures: dict[int, tuple[str, str]] = {}
        self.probes: dict[int, str] = {}
        self.stats = EngineStats()
        self._thread = threading.Thread(target=engine.run)
        self._thread.start()

    def save(self, delta: Delta) -> DeltaRef:
        path = self.scratch / f"{delta.digest}.safetensors"
        native.save(delta, path)
        return DeltaRef(delta.digest, str(path))

    def encode(
        self,
        rows: dict[int, list[int]],
        delta: DeltaRef | None = None,
        *,
        head: bool = False,
        tenant: str = "t",
    ) -> None:
        want = Want("head" if head else "embedding")
        self.engine.receive(Encode(tenant, [(n, EncoderInput(ids)) for n, ids in rows.items()], delta, want))

    def wait(self, *rows: int) -> None:
        """Until each of these rows or loads has its end."""
        while not set(rows) <= self.vectors.keys() | self.failures.keys() | self.probes.keys():
            self._take(self._replies.get(timeout=60))

    def wait_stats(self, wanted: Callable[[EngineStats], bool]) -> None:
        """Until a report says so."""
        while not wanted(self.stats):
            self._take(self._replies.get(timeout=60))

    def _take(self, reply: Reply) -> None:
        match reply:
            case Encoded(rows):
                for row, vector in rows:
                    assert row not in self.vectors
                    self.vectors[row] = torch.frombuffer(bytearray(vector.values), dtype=torch.float32)
            case Failed(row, code, message):
                assert row not in self.failures
                self.failures[row] = (code, message)
            case Loaded(row, result):
                self.probes[row] = result.outcome
            case Stats(stats):
                self.stats = stats

    def close(self) -> None:
        self.engine.receive(None)
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT, unless a test asks for another family."""
    family: str = getattr(request, "param", "bert")
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny", family)


@pytest.fixture(scope="module")
def truth(folder: Path) -> EncoderRunner:
    """The same rows one by one, in the implementation that is the truth."""
    return EncoderRunner(
        backbones.load("tiny", folder, torch.device("cpu"), torch.float32), "reference", prepack=False
    )


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def begin(**changes: object) -> Harness:
        made.append(Harness(folder, tmp_path, **changes))
        return made[-1]

    yield begin
    for harness in made:
        harness.close()


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(3, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(truth: EncoderRunner, ids: list[int], *parts: Delta, head: bool = False) -> Tensor:
    spec, weights = truth.backbone.spec, FrozenTensors(truth.backbone.folder)
    packed = pack(methods.lower_sum([(part, 1.0) for part in parts], spec, weights), spec, torch.float32)
    (hidden,) = truth.run([EncoderRow(ids, packed if parts else None)])
    if head:
        assert packed.head is not None
        return heads.apply(packed.head, hidden)
    return hidden.mean(0)


def same(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    # two implementations round differently; ModernBERT makes 1.1e-5 of it here
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 2e-5


def with_head(body: Delta, outputs: int, seed: int, pooling: str = "first") -> Delta:
    drawn = torch.randn(outputs, 32, generator=torch.Generator().manual_seed(seed))
    config = {"kind": "classify", "pooling": pooling, "activations": ["identity"], "labels": None}
    return Delta((*body.components, Component("head", config, {"layers.0/weight": drawn})))


POISON = Delta((Component("bitfit", {}, {"layers.0.mlp.down/beta": torch.full((32,), 3e38)}),))


@pytest.mark.parametrize("folder", ["bert", "distilbert", "modernbert"], indirect=True)
def test_rows_of_all_sorts_at_once(start: Callable[..., Harness], truth: EncoderRunner) -> None:
    spec = truth.backbone.spec
    sorts = ("lora", "bottleneck", "bitfit", "prompt", "prefix", "ia3")
    kinds = [kind for kind in sorts if kind in served(spec)]
    deltas = [make(spec, kind, n) for n, kind in enumerate(kinds)]
    classified = [with_head(delta, 2 + 30 * n, n) for n, delta in enumerate(deltas)]
    harness = start()
    for n, delta in enumerate(deltas):
        harness.encode(
            {10 * n: tokens(n, 3 + n), 10 * n + 1: tokens(n, 20)}, harness.save(delta), tenant=f"t{n % 2}"
        )
        harness.encode({10 * n + 2: tokens(n, 9)}, harness.save(classified[n]), head=True)
        harness.encode({10 * n + 3: tokens(n, 9)}, harness.save(classified[n]))
        harness.encode({10 * n + 4: tokens(n, 8 + n)})
    harness.wait(*(10 * n + k for n in range(len(deltas)) for k in range(5)))
    assert harness.failures == {}
    for n, (delta, full) in enumerate(zip(deltas, classified, strict=True)):
        same(harness.vectors[10 * n], alone(truth, tokens(n, 3 + n), delta))
        same(harness.vectors[10 * n + 1], alone(truth, tokens(n, 20), delta))
        same(harness.vectors[10 * n + 2], alone(truth, tokens(n, 9), full, head=True))
        same(harness.vectors[10 * n + 3], alone(truth, tokens(n, 9), full))
        same(harness.vectors[10 * n + 4], alone(truth, tokens(n, 8 + n)))
    harness.wait_stats(lambda stats: stats.rows_waiting == 0 and stats.deltas_device == 2 * len(deltas))
    harness.engine.batcher.check_integrity()


def test_bfloat16(start: Callable[..., Harness], truth: EncoderRunner) -> None:
    spec = truth.backbone.spec
    delta = with_head(make(spec, "lora", 1, std=0.1), 5, 1)
    harness = start(dtype="bfloat16")
    ref = harness.save(delta)
    harness.encode({1: tokens(1, 20)}, ref, head=True)
    harness.encode({2: tokens(1, 20)}, ref)
    harness.engine.receive(Load(3, ref))
    harness.wait(1, 2, 3)
    assert harness.probes[3] == "changes"
    for row, head in ((1, True), (2, False)):
        wanted = alone(truth, tokens(1, 20), delta, head=head)
        assert float((harness.vectors[row] - wanted).abs().max() / wanted.abs().max()) < 0.05


def test_a_sum(start: Callable[..., Harness], truth: EncoderRunner) -> None:
    spec = truth.backbone.spec
    one, two = make(spec, "lora", 1), with_head(make(spec, "bottleneck", 2), 3, 1)
    harness = start()
    refs = [harness.save(one), harness.save(two)]
    ref = DeltaRef.of_sum([DeltaPart(part.digest, part.path) for part in refs])
    harness.encode({1: tokens(1, 7)}, ref, head=True)
    two_heads = DeltaRef.of_sum(
        [DeltaPart(part.digest, part.path) for part in (refs[1], harness.save(with_head(one, 4, 2)))]
    )
    harness.encode({2: tokens(1, 7)}, two_heads, head=True)
    harness.wait(1, 2)
    same(harness.vectors[1], alone(truth, tokens(1, 7), one, two, head=True))
    assert harness.failures[2][0] == "invalid_composition"


def test_room_for_one_delta_at_a_time(start: Callable[..., Harness], truth: EncoderRunner) -> None:
    spec, weights = truth.backbone.spec, FrozenTensors(truth.backbone.folder)
    deltas = [make(spec, "lora", n) for n in range(4)]
    largest = max(pack(methods.lower(delta, spec, weights), spec, torch.float32).nbytes for delta in deltas)
    harness = start(delta_bytes=largest + 64)
    for n, delta in enumerate([*deltas, *deltas]):
        harness.engine.receive(Load(100 + n, harness.save(delta)))
        harness.encode({n: tokens(n, 6)}, harness.save(delta))
    harness.wait(*range(8), *range(100, 108))
    for n, delta in enumerate([*deltas, *deltas]):
        same(harness.vectors[n], alone(truth, tokens(n, 6), delta))
        assert harness.probes[100 + n] == "changes"
    harness.wait_stats(lambda stats: stats.deltas_host == 4 and stats.rows_waiting == 0)
    assert harness.stats.delta_bytes_device <= largest + 64


def test_a_delta_just_tried_gives_way_to_a_row_that_waits(
    start: Callable[..., Harness], truth: EncoderRunner
) -> None:
    """The engine must not fall asleep on a row that found the room taken in the step of the trial."""
    spec, weights = truth.backbone.spec, FrozenTensors(truth.backbone.folder)
    deltas = [random_delta(spec, "lora", seed) for seed in (5, 10)]
    size = pack(methods.lower(deltas[0], spec, weights), spec, torch.float32).nbytes
    harness = start(delta_bytes=size + 64)
    refs = [harness.save(delta) for delta in deltas]
    for n in range(20):
        harness.engine.receive(Load(100 + n, refs[n % 2]))
        harness.encode({n: tokens(n, 6)}, refs[(n + 1) % 2])
        harness.wait(n, 100 + n)
    assert harness.failures == {}


def test_a_poisoned_delta_fails_its_row_and_leaves_its_neighbours(
    start: Callable[..., Harness], truth: EncoderRunner
) -> None:
    harness = start()
    poison = harness.save(POISON)
    harness.engine.receive(Load(50, poison))
    harness.wait(50)
    assert harness.probes[50] == "not_finite"
    harness.encode({1: tokens(1, 5)})
    harness.encode({2: tokens(2, 5)}, poison)
    harness.wait(1, 2)
    same(harness.vectors[1], alone(truth, tokens(1, 5)))
    assert harness.failures[2][0] == "row_failed"
    harness.wait_stats(lambda stats: poison.digest in stats.quarantined)
    assert "float32" in harness.stats.quarantined[poison.digest]
    harness.engine.receive(Drop(poison.digest))
    harness.encode({3: tokens(1, 5)})
    harness.wait(3)
    harness.wait_stats(lambda stats: not stats.quarantined and stats.deltas_device == 0)


def test_a_poisoned_sum_is_refused_afterwards(start: Callable[..., Harness], truth: EncoderRunner) -> None:
    harness = start()
    parts = [harness.save(delta) for delta in (POISON, make(truth.backbone.spec, "lora", 1))]
    ref = DeltaRef.of_sum([DeltaPart(part.digest, part.path) for part in parts])
    harness.encode({1: tokens(1, 5)}, ref)
    harness.wait(1)
    harness.encode({2: tokens(1, 5), 3: tokens(1, 4)}, ref)
    harness.wait(2, 3)
    assert [harness.failures[n][0] for n in (1, 2, 3)] == [
        "row_failed",
        "delta_quarantined",
        "delta_quarantined",
    ]


def test_what_cannot_run_says_so(start: Callable[..., Harness], truth: EncoderRunner) -> None:
    spec = truth.backbone.spec
    harness = start()
    plain, missing = harness.save(make(spec, "lora", 1)), DeltaRef("f" * 64, "nowhere.safetensors")
    tagging = Component(
        "head",
        {"kind": "tag", "pooling": "none", "activations": ["identity"], "labels": None},
        {"layers.0/weight": torch.ones(3, 32)},
    )
    prompt = Delta((Component("prompt", {}, {"embeddings": torch.ones(2, 32)}),))
    long = Delta((Component("prompt", {}, {"embeddings": torch.ones(spec.max_positions, 32)}),))
    harness.encode({1: tokens(1, 5)}, plain, head=True)
    harness.encode({2: tokens(1, 5)}, head=True)
    harness.encode({3: tokens(1, 5)}, missing)
    harness.encode({4: tokens(1, 5)}, harness.save(Delta((*prompt.components, tagging))), head=True)
    harness.encode({5: tokens(1, spec.max_positions)}, harness.save(prompt))
    harness.encode({6: tokens(1, 5)}, harness.save(long))
    endless = Delta((Component("prompt", {"after_norm": True}, {"embeddings": torch.ones(1025, 32)}),))
    harness.encode({10: tokens(1, 5)}, harness.save(endless))
    harness.engine.receive(Submit(7, "t", [3, 4], None, SamplingParams(max_tokens=1)))
    harness.engine.receive(Load(8, missing))
    harness.encode({9: tokens(1, 5)})
    harness.wait(*range(1, 11))
    assert {row: code for row, (code, _) in harness.failures.items()} == {
        1: "unsupported_task",
        2: "unsupported_task",
        3: "row_failed",
        4: "unsupported_task",
        5: "context_length_exceeded",
        6: "row_failed",
        7: "unsupported_task",
        8: "invalid_delta",
        10: "row_failed",
    }
    same(harness.vectors[9], alone(truth, tokens(1, 5)))


def test_cancelled_rows_give_nothing(start: Callable[..., Harness]) -> None:
    harness = start(max_rows=1)
    harness.encode({n: tokens(n, 20) for n in range(40)})
    for n in range(20, 40):
        harness.engine.receive(Cancel(n))
    harness.encode({100: tokens(1, 5)})
    harness.wait(*range(20), 100)
    harness.wait_stats(lambda stats: stats.rows_waiting == 0)
    assert len(harness.engine.batcher) == 0


def test_too_many_rows_are_refused(start: Callable[..., Harness]) -> None:
    harness = start(max_waiting=3)
    harness.encode({n: tokens(n, 5) for n in range(10)})
    harness.wait(*range(10))
    assert sorted(harness.vectors) == [0, 1, 2]
    assert {code for code, _ in harness.failures.values()} == {"unavailable"}


def test_robertas_positions_begin_behind_the_padding(tmp_path: Path) -> None:
    roberta = write_encoder(tmp_path / "roberta-tiny", "roberta")
    truth = EncoderRunner(backbones.load("r", roberta, torch.device("cpu"), torch.float32), "reference")
    harness = Harness(roberta, tmp_path)
    try:
        longest = harness.engine.info.max_model_len
        ids, delta = tokens(1, longest), make(truth.backbone.spec, "lora", 3)
        harness.encode({1: ids}, harness.save(delta))
        harness.encode({2: [*ids, 5]})
        harness.wait(1, 2)
        same(harness.vectors[1], alone(truth, ids, delta))
        assert harness.failures[2][0] == "context_length_exceeded"
    finally:
        harness.close()


def test_limits_of_the_input(start: Callable[..., Harness]) -> None:
    harness = start()
    assert harness.engine.info.max_model_len == harness.engine.runner.backbone.spec.max_positions
    assert start(max_model_len=16).engine.info.max_model_len == 16
