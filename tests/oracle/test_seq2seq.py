"""Encoder-decoders through the engine's own runner: rows of every kind are the libraries' own, alone and in one batch."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from deltas import methods
from deltas.bank import PackedDelta
from deltas.delta import Component, Delta
from deltas.formats import read
from deltas.methods import METHODS
from deltas.ops import Mode
from tests import deltas_of_every_kind as kinds
from tests.oracle import lengths, peft_table, test_adapterhub_table, test_opendelta_table
from tests.oracle.padded import PaddedRow, PaddedRunner
from tests.oracle.rows import same
from tests.oracle.seq2seq_rows import make_runner, place, runner_of, score
from tests.oracle.test_peft_table import upload

CLOSE = 1e-5
FAMILIES = ["bart", "t5", "t5_gated"]
MODES: list[Mode] = ["native", "dense", "reference"]
STEPS = [(1, 1), (3, 2), (100, 100)]  # decoder tokens in the first step, and in each after it

PEFT_FAMILIES = ["bart", "t5"]
PEFT_CELLS = [
    (family.name, case) for case, family in peft_table.cells(peft_table.CASES) if family.name in PEFT_FAMILIES
]
LONG = {"bart": 38, "t5": 465, "t5_gated": 465}  # source tokens, within BART's 48 positions behind a prompt
ANSWERS = ([0, 4], [0], [0, 22, 9, 9, 31, 7, 8], [0, 6, 31], [0, 40, 12, 5], [0, 27])


@cache
def padded(family: str) -> PaddedRunner:
    return PaddedRunner(family)


def sources(family: str) -> list[list[int]]:
    long = [2 + at % 58 for at in range(LONG[family] - 1)] + [1]
    return [[5, 1], [9, 44, 1], long, [13, 7, 7, 59, 22, 41, 1], [60, 3, 17, 1], [30] * 31]


def check(got: Tensor, wanted: Tensor, name: str) -> None:
    assert got.shape == wanted.shape, name
    assert same(got, wanted) < CLOSE, (name, same(got, wanted))


class Expected:
    """Rows and what the delta's own library makes of them."""

    def __init__(self) -> None:
        self.rows: list[tuple[Delta | None, PaddedRow, Tensor]] = []

    def add(
        self, name: str, delta: Delta | None, ids: list[int], decoder_ids: list[int], logits: Tensor
    ) -> None:
        self.rows.append((delta, PaddedRow(ids, None, decoder_ids, name), logits))

    def check(self, family: str, mode: Mode, first: int, chunk: int) -> None:
        """All in one batch, in any order."""
        runner = runner_of(family, mode)
        placed: dict[int, PackedDelta] = {}
        batch, wanted = [], []
        for delta, row, logits in random.Random(family).sample(self.rows, len(self.rows)):
            packed = None
            if delta is not None:
                packed = placed.setdefault(id(delta), placed.get(id(delta)) or place(runner, delta))
            batch.append(PaddedRow(row.ids, packed, row.decoder_ids, row.name))
            wanted.append(logits)
        for row, got, logits in zip(
            batch, score(runner, batch, first=first, chunk=chunk), wanted, strict=True
        ):
            check(got, logits, row.name)


@cache
def peft(_family: str) -> dict[str, Expected]:
    """By case; its files are read and thrown away."""
    return {}


def peft_case(family: str, case: peft_table.Case, folder: Path) -> Expected:
    known = peft(family)
    if case.name not in known:
        peft_table.save_delta(case, peft_table.FAMILIES[family], folder, seed=1)
        model = peft_table.load_delta(peft_table.FAMILIES[family], folder)
        delta = read(upload(folder), padded(family).spec, padded(family).weights)
        known[case.name] = Expected()
        for row in peft_table.ROWS:
            logits = peft_table.logits(model, row)
            known[case.name].add(case.name, delta, list(row.ids), list(row.decoder_ids), logits)
    return known[case.name]


@pytest.mark.parametrize(
    ("family", "case"), PEFT_CELLS, ids=lambda part: part if isinstance(part, str) else part.name
)
def test_peft(family: str, case: peft_table.Case, tmp_path: Path) -> None:
    peft_case(family, case, tmp_path).check(family, "native", 1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", PEFT_FAMILIES)
def test_peft_in_one_batch(family: str, mode: Mode, tmp_path: Path) -> None:
    every = Expected()
    for case in [case for of, case in PEFT_CELLS if of == family]:
        (tmp_path / case.name).mkdir()
        every.rows += peft_case(family, case, tmp_path / case.name).rows
    for row, logits in zip(peft_table.ROWS, peft_table.backbone_logits(family), strict=True):
        every.add("base", None, list(row.ids), list(row.decoder_ids), logits)
    every.check(family, mode, *STEPS[MODES.index(mode)])


def fixtures(family: str, folder: Path) -> dict[str, Expected]:
    """AdapterHub's and OpenDelta's cases without a head, by library and name."""
    found: dict[str, Expected] = {}
    for library, module in (("adapterhub", test_adapterhub_table), ("opendelta", test_opendelta_table)):
        known = module.expected(family)
        rows = sum(key.startswith("decoder_ids.") for key in known)
        for name in [case for of, case in module.SERVED if of == family]:
            cases = (
                module.INDEX[family]["cases"] if library == "adapterhub" else module.INDEX["cases"][family]
            )
            if cases[name]["head"]:
                continue
            here = folder / f"{library}-{name}"
            here.mkdir()
            if library == "adapterhub":
                delta = test_adapterhub_table.load(family, name, here)
            else:
                files = test_opendelta_table.as_safetensors(family, name, here)
                delta = read(files, padded(family).spec)
            made = found[f"{library}/{name}"] = Expected()
            for n in range(rows):
                logits = known.get(f"{name}.{n}")
                logits = known[f"{cases[name]['like']}.{n}"] if logits is None else logits
                ids, answer = known[f"ids.{n}"].tolist(), known[f"decoder_ids.{n}"].tolist()
                made.add(f"{library}/{name}", delta, ids, answer, logits)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_adapterhub_and_opendelta(family: str, tmp_path: Path) -> None:
    cases = fixtures(family, tmp_path)
    assert len(cases) > 5
    for expected in cases.values():
        expected.check(family, "native", 1, 1)
    every = Expected()
    every.rows = [row for expected in cases.values() for row in expected.rows]
    for mode, (first, chunk) in zip(MODES, STEPS, strict=True):
        every.check(family, mode, first, chunk)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method(family: str, mode: Mode) -> None:
    """Ragged rows of every method, one with a long source, against the padded harness, where each is alone."""
    slow, every, texts = padded(family), Expected(), sources(family)
    for n, name in enumerate(["base", *kinds.served(slow.spec)]):
        delta = None if name == "base" else kinds.make(slow.spec, name, n)
        source, answer = texts[n % len(texts)], list(ANSWERS[n % len(ANSWERS)])
        placed = None if delta is None else slow.place(delta)
        (logits,) = slow.logits([PaddedRow(source, placed, answer)])
        every.add(name, delta, source, answer, logits)
    for first, chunk in STEPS:
        every.check(family, mode, first, chunk)


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (3, 1)])
def test_stacks_of_different_depth(encoder: int, decoder: int, tmp_path: Path) -> None:
    """As distilled BARTs have."""
    config = lengths.ENCODER_DECODERS["bart"]()
    config.encoder_layers, config.decoder_layers = encoder, decoder
    folder = lengths.write(config, AutoModelForSeq2SeqLM, tmp_path / "bart")
    slow, runner, texts = PaddedRunner(folder), make_runner(folder), sources("bart")
    rows, wanted = [], []
    everywhere = [name for name in kinds.served(slow.spec) if name not in kinds.NEEDS_ALL_TOKENS]
    for n, name in enumerate(["base", *everywhere]):
        delta = None if name == "base" else kinds.make(slow.spec, name, n)
        source, answer = texts[n % len(texts)], ANSWERS[n % len(ANSWERS)]
        wanted += slow.logits([PaddedRow(source, None if delta is None else slow.place(delta), answer)])
        rows.append(PaddedRow(source, None if delta is None else place(runner, delta), answer, name))
    for row, got, logits in zip(rows, score(runner, rows, first=2), wanted, strict=True):
        check(got, logits, row.name)


def prefixes(runner: PaddedRunner, lengths: dict[str, int], seed: int, **config: object) -> Delta:
    """A prefix of another length at every site."""
    make, spec = torch.Generator().manual_seed(seed), runner.spec
    tensors = {}
    for site, n in lengths.items():
        for leaf in ("keys", "values"):
            tensors[f"{site}/{leaf}"] = torch.randn(n, spec.kv_heads, spec.head_dim, generator=make)
    return Delta((Component("prefix", dict(config), tensors),))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", PEFT_FAMILIES)
def test_prefixes_whose_lengths_differ_by_layer(family: str, mode: Mode) -> None:
    slow, every, texts = padded(family), Expected(), sources(family)
    sites = [f"{stack}.layers.{n}.{leaf}.kv" for stack, leaf in STACKS for n in (0, 1)]
    for seed in range(12):
        rng = random.Random(seed)
        chosen = {site: rng.randint(1, 20) for site in rng.sample(sites, rng.randint(1, len(sites)))}
        delta = prefixes(slow, chosen, seed, shifts_positions=seed % 2 == 0)
        methods.check(delta, slow.spec)
        source, answer = texts[seed % len(texts)], list(ANSWERS[2])
        (logits,) = slow.logits([PaddedRow(source, slow.place(delta), answer)])
        every.add(f"prefix {seed}", delta, source, answer, logits)
    for first, chunk in STEPS:
        every.check(family, mode, first, chunk)


STACKS = (("encoder", "attn"), ("decoder", "attn"), ("decoder", "cross"))


@pytest.mark.parametrize("family", PEFT_FAMILIES)
def test_gated_prefixes_of_the_encoder(family: str) -> None:
    """Their gates average over what the encoder's attention reads."""
    slow, every = padded(family), Expected()
    sites, width = (
        ["encoder.layers.0.attn.kv", "encoder.layers.1.attn.kv"],
        slow.spec.kv_heads * slow.spec.head_dim,
    )
    for seed, gates in enumerate((1, 2, 1, 2)):
        make = torch.Generator().manual_seed(seed)
        tensors = {"own/flat": torch.randn((3 + seed) * 4 * width, generator=make)}
        for site in sites:
            tensors[f"{site}/gate"] = torch.randn(gates, slow.spec.hidden, generator=make)
            tensors[f"{site}/gate_bias"] = torch.randn(gates, generator=make)
        config = {
            "stacks": {"own": sites},
            "length": 3 + seed,
            "activation": "tanh",
            "shifts_keys": seed > 1 and family == "t5",
        }
        delta = Delta((Component("packed_prefix", METHODS["packed_prefix"].normalise(config), tensors),))
        methods.check(delta, slow.spec)
        for source, answer in zip(sources(family), ANSWERS, strict=True):
            (logits,) = slow.logits([PaddedRow(source, slow.place(delta), answer)])
            every.add(f"gated {seed}", delta, list(source), list(answer), logits)
    for mode, (first, chunk) in zip(MODES, STEPS, strict=True):
        every.check(family, mode, first, chunk)
