"""OpenDelta's column of the oracle table: what it saved gives here what it gives there, on every family.

``make_opendelta_table.py`` made the files and the logits; ``index.json`` beside them says why a cell is empty.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltas.delta import Delta
from deltas.errors import UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.formats.opendelta import CONFIG, PICKLED, WEIGHTS
from deltas.formats.opendelta.config import DEFAULTS, KEYS
from deltas.formats.opendelta.modules import modules
from tests.oracle.padded import PaddedRow, PaddedRunner

FOLDER = Path(__file__).parent / "fixtures" / "opendelta_table"
INDEX: dict[str, Any] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
CELLS = [(family, case) for family, cases in INDEX["cases"].items() for case in cases]
CLOSE = 1e-5

# What the library can do and the server does not, and what the error says.
REFUSED = {
    ("bart", "soft_prompt"): "without the backbone's factor",
    ("gpt2", "prefix_last_layer"): "some layers only",
    ("t5_gated", "lora_and_biases"): "relative position biases",
}
SERVED = [cell for cell in CELLS if cell not in REFUSED]


@cache
def runner(family: str) -> PaddedRunner:
    return PaddedRunner(family)


@cache
def expected(family: str) -> dict[str, Tensor]:
    return load_file(FOLDER / family / "expected.safetensors")


def as_saved(family: str, case: str) -> DeltaFiles:
    folder = FOLDER / family / case
    return DeltaFiles({name: folder / name for name in (CONFIG, PICKLED)})


def as_safetensors(family: str, case: str, folder: Path) -> DeltaFiles:
    """The same files, without the process that converts pickled ones."""
    source = FOLDER / family / case
    save_file(torch.load(source / PICKLED, weights_only=True), folder / WEIGHTS)
    return DeltaFiles({CONFIG: source / CONFIG, WEIGHTS: folder / WEIGHTS})


def rows(family: str, delta: Delta | None) -> list[PaddedRow]:
    known = expected(family)
    packed = None if delta is None else runner(family).place(delta)
    return [
        PaddedRow(
            known[f"ids.{n}"].tolist(),
            packed,
            known[f"decoder_ids.{n}"].tolist() if f"decoder_ids.{n}" in known else None,
        )
        for n in range(INDEX["rows"])
    ]


def answers(runner: PaddedRunner, rows: list[PaddedRow], case: str) -> list[Tensor]:
    """The language model's logits, or what the case's own head gives."""
    heads = {name for cases in INDEX["cases"].values() for name, made in cases.items() if made["head"]}
    return runner.classes(rows) if case in heads else runner.logits(rows)


def check(family: str, case: str, got: list[Tensor]) -> None:
    for n, logits in enumerate(got):
        wanted = expected(family)[f"{case}.{n}"]
        error = float((logits - wanted).abs().max() / wanted.abs().max())
        assert error < CLOSE, f"row {n}: {error:.3g}"


@pytest.mark.parametrize("family", INDEX["cases"])
def test_backbone(family: str) -> None:
    check(family, "base", runner(family).logits(rows(family, None)))


@pytest.mark.parametrize(("family", "case"), SERVED)
def test_equals_the_library(family: str, case: str, tmp_path: Path) -> None:
    delta = read(as_safetensors(family, case, tmp_path), runner(family).spec)
    assert delta.format == "opendelta"
    check(family, case, answers(runner(family), rows(family, delta), case))


@pytest.mark.parametrize(("family", "case"), sorted(REFUSED))
def test_refused(family: str, case: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDelta, match=REFUSED[family, case]):
        read(as_safetensors(family, case, tmp_path), runner(family).spec)


@pytest.mark.parametrize("case", ["lora", "compacter", "bitfit", "soft_prompt", "prefix_reparameterized"])
def test_pickled_is_the_same_delta(case: str, tmp_path: Path) -> None:
    spec = runner("bert").spec
    assert (
        read(as_saved("bert", case), spec).digest == read(as_safetensors("bert", case, tmp_path), spec).digest
    )


def test_every_cell_is_a_case_or_has_a_reason() -> None:
    names = {case for cases in INDEX["cases"].values() for case in cases}
    for family, cases in INDEX["cases"].items():
        assert names == set(cases) | set(INDEX["lacks"][family])
        assert all(INDEX["lacks"][family].values())


@pytest.mark.parametrize("family", INDEX["cases"])
def test_all_at_once(family: str, tmp_path: Path) -> None:
    batch: list[tuple[str, int, PaddedRow]] = []
    heads = {name for name, made in INDEX["cases"][family].items() if made["head"]}
    for case in [case for of, case in SERVED if of == family and case not in heads]:
        (tmp_path / case).mkdir()
        delta = read(as_safetensors(family, case, tmp_path / case), runner(family).spec)
        batch += [(case, n, row) for n, row in enumerate(rows(family, delta))]
    batch += [("base", n, row) for n, row in enumerate(rows(family, None))]
    random.Random(3).shuffle(batch)
    got = runner(family).logits([row for _, _, row in batch])
    for (case, n, _), logits in zip(batch, got, strict=True):
        wanted = expected(family)[f"{case}.{n}"]
        assert float((logits - wanted).abs().max() / wanted.abs().max()) < CLOSE, case


@pytest.mark.parametrize("family", INDEX["cases"])
def test_common_names_and_order_are_the_library_s(family: str) -> None:
    """A parallel adapter's pairs depend on the order too."""
    names = INDEX["common_names"][family]
    ours = [path for path, module in modules(runner(family).spec).items() if path in names]
    layers = [path for path in ours if ".0" in path]
    assert [path for path in names if path in layers] == layers
    found = {path: modules(runner(family).spec)[path].common for path in ours}
    assert found == {path: names[path] for path in ours}
    assert family in ("bart", "distilbert", "llama") or layers


@pytest.mark.parametrize("kind", INDEX["defaults"])
def test_every_key_of_the_library_is_known_with_its_default(kind: str) -> None:
    known = dict(INDEX["defaults"][kind])
    for common in ("modified_modules", "exclude_modules", "unfrozen_modules", "common_structure"):
        known.pop(common)
    own = {key: value for key, value in known.items() if not key.startswith("backbone_")}
    assert set(own) == set(KEYS[kind])
    assert DEFAULTS[kind].items() <= own.items()
    assert all(KEYS[kind][key] is None or key in DEFAULTS[kind] or _is_one(kind, key, own) for key in own)


def _is_one(kind: str, key: str, defaults: dict[str, Any]) -> bool:
    """A key that may only have its default, or what means the same."""
    check = KEYS[kind][key]
    assert check is not None
    check(key, defaults[key])
    return True
