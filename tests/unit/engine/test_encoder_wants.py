"""What an encoder makes of rows besides vectors by the backbone's files: tokens, words at a mask, other pooling, types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from deltas import heads, methods
from deltas.bank import PackedDelta
from deltas.delta import Delta
from deltas.pack import pack
from deltas.weights import FrozenTensors
from server.engine import backbone as backbones
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.messages import Encode
from server.types import DeltaRef, EncoderInput, Want
from tests.deltas_of_every_kind import make
from tests.encoders import add_tokenizer, write_encoder
from tests.unit.engine.test_encoder_engine import Harness, same, tokens, with_head

KINDS = ("lora", "prompt", "prefix", "bitfit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny", "bert")


@pytest.fixture(scope="module")
def truth(folder: Path) -> EncoderRunner:
    return EncoderRunner(
        backbones.load("tiny", folder, torch.device("cpu"), torch.float32), "reference", prepack=False
    )


@pytest.fixture
def harness(folder: Path, tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(folder, tmp_path, prefill_tokens=400, max_rows=60)
    yield harness
    harness.close()


def send(harness: Harness, rows: dict[int, EncoderInput], want: Want, delta: DeltaRef | None = None) -> None:
    harness.engine.receive(Encode("t", list(rows.items()), delta, want))


def placed(truth: EncoderRunner, delta: Delta) -> PackedDelta:
    spec = truth.backbone.spec
    return pack(methods.lower(delta, spec, FrozenTensors(truth.backbone.folder)), spec, torch.float32)


def own_states(truth: EncoderRunner, ids: list[int], delta: PackedDelta | None) -> Tensor:
    """Of the row's own tokens: a prompt's are before them."""
    return truth.run([EncoderRow(ids, delta)])[0][-len(ids) :]


def test_words_at_masks_of_many_deltas_in_one_step(harness: Harness, truth: EncoderRunner) -> None:
    deltas: list[Delta | None] = [None, *(make(truth.backbone.spec, kind, n) for n, kind in enumerate(KINDS))]
    cases = [(n, place) for n in range(len(deltas)) for place in (0, 2, 6)]
    for n, delta in enumerate(deltas):
        ref = None if delta is None else harness.save(delta)
        rows = {10 * n + place: EncoderInput(tokens(place, 7), mask=place) for of, place in cases if of == n}
        send(harness, rows, Want("mask", candidates=[40, 7, 7 + n]), ref)
    harness.wait(*(10 * n + place for n, place in cases))
    assert harness.failures == {}
    for n, place in cases:
        delta = deltas[n]
        packed = None if delta is None else placed(truth, delta)
        state = own_states(truth, tokens(place, 7), packed)[place : place + 1]
        logits = truth.logits(state, packed)
        assert logits is not None
        same(harness.vectors[10 * n + place], logits[0, [40, 7, 7 + n]])


def test_a_line_for_every_token_of_the_row_itself(harness: Harness, truth: EncoderRunner) -> None:
    for n, kind in enumerate(KINDS):
        delta = with_head(make(truth.backbone.spec, kind, n), 3 + n, n, pooling="none")
        send(harness, {n: EncoderInput(tokens(n, 5 + n))}, Want("tokens"), harness.save(delta))
        harness.wait(n)
        packed = placed(truth, delta)
        assert packed.head is not None
        wanted = heads.apply(packed.head, own_states(truth, tokens(n, 5 + n), packed))
        same(harness.vectors[n].reshape(-1, 3 + n), wanted)


@pytest.mark.parametrize("normalise", [None, False, True])
@pytest.mark.parametrize("pooling", [None, "mean", "cls", "max"])
def test_other_pooling(
    harness: Harness, truth: EncoderRunner, pooling: str | None, normalise: bool | None
) -> None:
    send(harness, {1: EncoderInput(tokens(1, 6))}, Want("embedding", pooling, normalise))
    harness.wait(1)
    states = own_states(truth, tokens(1, 6), None)
    vector = {"cls": states[0], "max": states.amax(0)}.get(str(pooling), states.mean(0))
    same(harness.vectors[1], torch.nn.functional.normalize(vector, dim=0) if normalise else vector)


def test_types(harness: Harness, truth: EncoderRunner) -> None:
    ids, types = tokens(1, 6), [0, 0, 0, 1, 1, 1]
    send(harness, {1: EncoderInput(ids, types), 2: EncoderInput(ids, [0] * 6)}, Want("embedding"))
    harness.wait(1, 2)
    same(harness.vectors[1], truth.run([EncoderRow(ids, None, types)])[0].mean(0))
    same(harness.vectors[2], truth.run([EncoderRow(ids)])[0].mean(0))


def test_each_row_has_its_own_error(harness: Harness, truth: EncoderRunner) -> None:
    pooled = harness.save(with_head(make(truth.backbone.spec, "lora", 1), 2, 1))
    ids = tokens(1, 5)
    send(harness, {1: EncoderInput(ids)}, Want("tokens"), pooled)
    send(harness, {2: EncoderInput(ids)}, Want("tokens"))
    rows = {3: EncoderInput(ids), 4: EncoderInput(ids, mask=5), 5: EncoderInput(ids, mask=4)}
    send(harness, rows, Want("mask", candidates=[7]))
    send(harness, {6: EncoderInput(ids, [0, 0, 2, 0, 0]), 7: EncoderInput(ids)}, Want("embedding"))
    harness.wait(*range(1, 8))
    assert {row: code for row, (code, _) in harness.failures.items()} == {
        1: "unsupported_task",
        2: "unsupported_task",
        3: "invalid_request",
        4: "invalid_request",
        6: "invalid_request",
    }
    same(harness.vectors[7], own_states(truth, ids, None).mean(0))


def test_a_checkpoint_without_its_head_expects_no_words(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(folder).save_pretrained(bare)
    harness = Harness(add_tokenizer(bare), tmp_path)
    try:
        send(harness, {1: EncoderInput(tokens(1, 5), mask=2)}, Want("mask", candidates=[7]))
        harness.wait(1)
        assert harness.failures[1][0] == "unsupported_task"
    finally:
        harness.close()
