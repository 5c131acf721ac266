"""All methods at once in one batch, in any mix and order: every row equals the same row alone.

That a row alone is right is what the tables of the libraries and of the native format show; here it is that rows do not
disturb one another. Deltas come from ``tests/deltas_of_every_kind.py``, which knows every method that is served.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltas import heads, methods
from deltas.bank import PackedDelta
from deltas.errors import UnsupportedDelta
from deltas.methods import METHODS
from deltas.ops import Mode
from server.engine.runner import Runner
from tests import deltas_of_every_kind as kinds
from tests.oracle.padded import BACKBONES, PaddedRow, PaddedRunner
from tests.oracle.rows import Row, generate, make_runner, place, same

TOLERANCE = 1e-5
STEPS = 3
VARIANTS = 3  # deltas of each method
BASE = "base"
DECODER = "llama"
MODES: list[Mode] = ["native", "dense", "reference"]
FAMILIES = ["bert", "t5"]
PROMPTS = ([5], [9, 44], [60, 3, 17], [8, 30, 4, 21, 50], [13, 7, 7, 59, 22, 41, 6], list(range(3, 33)))
DECODER_PROMPTS = ([7, 4], [3], [58, 22, 9, 9], [6, 31], [40, 12, 5], [27])

Kind = tuple[str, int]
"""A method (or the backbone alone) and which of its variants."""


@dataclass(frozen=True)
class Asked:
    """One row: what it uses, and which prompt."""

    kind: Kind
    prompt: int


def distinct(names: list[Kind], count: int, _rng: random.Random) -> list[Kind]:
    return [names[i % len(names)] for i in range(count)]


def uniform(names: list[Kind], count: int, rng: random.Random) -> list[Kind]:
    return rng.choices(names, k=count)


def zipf(names: list[Kind], count: int, rng: random.Random) -> list[Kind]:
    return rng.choices(names, weights=[1 / rank for rank in range(1, len(names) + 1)], k=count)


def identical(names: list[Kind], count: int, _rng: random.Random) -> list[Kind]:
    return [names[0]] * count


def skewed(names: list[Kind], count: int, rng: random.Random) -> list[Kind]:
    """Four rows of five use one delta."""
    return [names[0] if rng.random() < 0.8 else rng.choice(names) for _ in range(count)]


POPULARITY: list[Callable[[list[Kind], int, random.Random], list[Kind]]] = [
    distinct,
    uniform,
    zipf,
    identical,
    skewed,
]


@st.composite
def mixes(draw: st.DrawFn, names: Sequence[str], most: int) -> list[Asked]:
    """Rows of a batch: a popularity mix over the kinds in random order, in random order, with random prompts."""
    rng = draw(st.randoms(use_true_random=False))
    every = [(name, variant) for name in names for variant in range(VARIANTS)] + [(BASE, 0)]
    rng.shuffle(every)
    popularity = draw(st.sampled_from(POPULARITY))
    chosen = popularity(every, draw(st.integers(2, most)), rng)
    rng.shuffle(chosen)
    return [Asked(kind, rng.randrange(len(PROMPTS))) for kind in chosen]


def served(family: str) -> list[str]:
    return kinds.served(padded(family).spec)


@cache
def padded(family: str) -> PaddedRunner:
    return PaddedRunner(family)


@cache
def padded_delta(family: str, kind: Kind) -> PackedDelta | None:
    runner = padded(family)
    return None if kind[0] == BASE else runner.place(kinds.make(runner.spec, *kind))


def padded_logits(family: str, rows: Sequence[Asked]) -> list[list[Tensor]]:
    """Logits of every row, and what its own head gives where it has one."""
    runner, batch = padded(family), []
    for row in rows:
        delta = padded_delta(family, row.kind)
        batch.append(PaddedRow(PROMPTS[row.prompt], delta, DECODER_PROMPTS[row.prompt], row.kind[0]))
    found = [[logits] for logits in runner.logits(batch)]
    for own, row, hidden in zip(found, batch, runner.hidden, strict=True):
        if row.delta is not None and row.delta.head is not None:
            own.append(heads.apply(row.delta.head, hidden))
    return found


@cache
def padded_alone(family: str, row: Asked) -> list[Tensor]:
    return padded_logits(family, [row])[0]


@cache
def engine(mode: Mode) -> Runner:
    return make_runner(BACKBONES / DECODER, torch.float32, mode)


@cache
def engine_delta(mode: Mode, kind: Kind) -> PackedDelta | None:
    runner = engine(mode)
    return None if kind[0] == BASE else place(runner, kinds.make(runner.backbone.spec, *kind))


def engine_rows(mode: Mode, rows: Sequence[Asked], chunk: int) -> list[Row]:
    batch = [
        Row(list(PROMPTS[row.prompt]), engine_delta(mode, row.kind), f"{row.kind[0]}/{row.kind[1]}")
        for row in rows
    ]
    generate(engine(mode), batch, STEPS, chunk=chunk)
    return batch


@cache
def engine_alone(mode: Mode, row: Asked) -> Row:
    return engine_rows(mode, [row], chunk=512)[0]


def check_row(got: Row, alone: Row) -> None:
    for step, (logits, own) in enumerate(zip(got.logits, alone.logits, strict=True)):
        assert same(logits, own) < TOLERANCE, (got.name, len(got.prompt), step)
        if (
            got.tokens[step] != alone.tokens[step]
        ):  # two tokens as likely to rounding: from here on, other texts
            best = own.topk(2).values
            assert float(best[0] - best[1]) < TOLERANCE * float(own.abs().max()), (got.name, step)
            return


def check_engine(mode: Mode, rows: Sequence[Asked], chunk: int) -> None:
    for row, got in zip(rows, engine_rows(mode, rows, chunk), strict=True):
        check_row(got, engine_alone(mode, row))


def check_padded(family: str, rows: Sequence[Asked]) -> None:
    for row, got in zip(rows, padded_logits(family, rows), strict=True):
        for logits, own in zip(got, padded_alone(family, row), strict=True):
            assert same(logits, own) < TOLERANCE, row


def test_every_method_has_a_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinds.all_methods() == sorted(METHODS)
    monkeypatch.setitem(METHODS, "brand_new", METHODS["lora"])  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="brand_new"):
        kinds.all_methods()


@pytest.mark.parametrize(
    "family", [DECODER, "gpt2", *FAMILIES, "roberta", "distilbert", "modernbert", "bart", "t5_gated"]
)
def test_what_a_family_does_not_take_is_refused(family: str) -> None:
    spec = padded(family).spec
    for name in set(kinds.all_methods()) - set(kinds.served(spec)):
        with pytest.raises(UnsupportedDelta):
            methods.check(kinds.make(spec, name, 0), spec)
    for name in kinds.served(spec):
        delta = kinds.make(spec, name, 0)
        methods.check(delta, spec)
        methods.check_values(delta, spec)
        assert delta.digest == kinds.make(spec, name, 0).digest != kinds.make(spec, name, 1).digest


@pytest.mark.parametrize("mode", MODES)
def test_each_kind_once(mode: Mode) -> None:
    """Every method of the decoder in batches as wide as the engine takes, so that none depends on luck."""
    names = [*served(DECODER), BASE]
    random.Random(mode).shuffle(names)
    for start in range(0, len(names), 30):
        rows = [
            Asked((name, i % VARIANTS), i % len(PROMPTS)) for i, name in enumerate(names[start : start + 30])
        ]
        check_engine(mode, rows, chunk=40)


@pytest.mark.parametrize("family", [*FAMILIES, "modernbert", "bart"])
def test_each_kind_once_padded(family: str) -> None:
    names = [*served(family), BASE]
    random.Random(family).shuffle(names)
    check_padded(family, [Asked((name, i % VARIANTS), i % len(PROMPTS)) for i, name in enumerate(names)])


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_through_the_engine(mode: Mode, data: st.DataObject) -> None:
    rows = data.draw(mixes(served(DECODER), 24))
    check_engine(mode, rows, chunk=data.draw(st.sampled_from([7, 40, 512])))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_padded(family: str, data: st.DataObject) -> None:
    check_padded(family, data.draw(mixes(served(family), 16)))
