"""AdapterHub's column of the oracle table: what it saved gives here what it gives there, on every family.

``make_adapterhub_table.py`` made the files and the outputs; ``index.json`` beside them says why a cell is empty.
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
from deltas.errors import DeltaError
from deltas.formats import DeltaFiles, read
from deltas.ops import Mode
from tests.oracle.padded import PaddedRow, PaddedRunner
from tests.oracle.rows import SLOTS, Row, generate, make_runner, place

FOLDER = Path(__file__).parent / "fixtures" / "adapterhub_table"
FAMILIES = ("llama", "gpt2", "bert", "roberta", "distilbert", "bart", "t5", "t5_gated")
INDEX: dict[str, dict[str, Any]] = {
    family: json.loads((FOLDER / family / "index.json").read_text(encoding="utf-8")) for family in FAMILIES
}
CLOSE = 1e-5

_GATE = "a causal backbone never has"
# What the library can do and the server does not, and what the error says.
REFUSED: dict[tuple[str, str], str] = {
    **{(family, "gated_bn"): _GATE for family in ("llama", "gpt2", "bart", "t5")},
    **{(family, "ia3_gated"): _GATE for family in ("llama", "gpt2", "bart", "t5")},
    **{(family, "prefix_gated"): _GATE for family in ("llama", "gpt2", "bart", "t5")},
    **{(family, "lora_gated"): _GATE for family in ("llama", "t5")},
    ("llama", "prefix_gates"): _GATE,
    ("llama", "unipelt"): _GATE,
    ("llama", "prefix_leave_out"): "every layer has the prefix",
    ("t5", "prefix_leave_out"): "loses T5's position bias",
    ("llama", "loreft"): "ReFT changes the first and last tokens",
    ("llama", "no_ln_after"): "the residual",
    ("bert", "no_ln_after"): "the norm of the backbone is dropped",
    ("gpt2", "inv_nice"): "no module of GPT-2",
    ("gpt2", "ia3_alpha"): "fused q, k, v layer by alpha",
    ("llama", "stack_parallel"): "in a Stack the library drops",
    ("bert", "stack_parallel"): "in a Stack the library drops",
    ("bert", "stack_lora"): "feeds one's output to the next",
    ("roberta", "stack_lora"): "feeds one's output to the next",
    ("distilbert", "stack_lora"): "feeds one's output to the next",
    ("bert", "head_pooler"): "reads the backbone's pooler",
}
CELLS = [(family, case) for family in FAMILIES for case in INDEX[family]["cases"]]
SERVED = [cell for cell in CELLS if cell not in REFUSED]


@cache
def runner(family: str, mode: Mode = "reference") -> PaddedRunner:
    return PaddedRunner(family, mode)


@cache
def expected(family: str) -> dict[str, Tensor]:
    return load_file(FOLDER / family / "expected.safetensors")


def files_of(folder: Path) -> DeltaFiles:
    """The files of a case, those of a composition with their folders' names."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "converted-" not in str(path)]
    return DeltaFiles({path.relative_to(folder).as_posix(): path for path in paths})


def unpickled(source: Path, folder: Path) -> Path:
    """The same files with safetensors in place of pickles, which need a process each to convert."""
    names = {
        "pytorch_adapter.bin": "adapter.safetensors",
        "pytorch_model_head.bin": "model_head.safetensors",
        "pytorch_model_adapter_fusion.bin": "model_adapter_fusion.safetensors",
    }
    for path in source.rglob("*"):
        target = folder / path.relative_to(source)
        if path.is_dir():
            target.mkdir()
        elif path.name in names:
            tensors = torch.load(path, weights_only=True)
            save_file({key: t.clone() for key, t in tensors.items()}, target.with_name(names[path.name]))
        else:
            target.write_bytes(path.read_bytes())
    return folder


def load(family: str, case: str, folder: Path) -> Delta:
    files = files_of(unpickled(FOLDER / family / case, folder))
    return read(files, runner(family).spec, runner(family).weights)


def rows(family: str, delta: Delta | None) -> list[PaddedRow]:
    known = expected(family)
    packed = None if delta is None else runner(family).place(delta)
    return [
        PaddedRow(
            known[f"ids.{n}"].tolist(),
            packed,
            known[f"decoder_ids.{n}"].tolist() if f"decoder_ids.{n}" in known else None,
        )
        for n in range(INDEX[family]["rows"])
    ]


def check(family: str, case: str, n: int, got: Tensor, *, last: bool = False) -> None:
    known = expected(family)
    like = "" if case == "base" else INDEX[family]["cases"][case]["like"]
    wanted = known.get(f"{case}.{n}", known.get(f"{like}.{n}"))
    assert wanted is not None
    if case == "prompt":  # the library answers for the prompt's tokens too
        wanted = wanted[-len(got) :]
    if case == "prompt_after_bos":
        wanted = torch.cat([wanted[:1], wanted[len(wanted) - len(got) + 1 :]])
    assert last or got.shape == wanted.shape
    error = float((got - wanted[-len(got) :]).abs().max() / wanted.abs().max())
    assert error < CLOSE, f"row {n}: {error:.3g}"


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone(family: str) -> None:
    for n, logits in enumerate(runner(family).logits(rows(family, None))):
        check(family, "base", n, logits)


@pytest.mark.parametrize(("family", "case"), SERVED, ids=lambda part: part)
def test_cell(family: str, case: str, tmp_path: Path) -> None:
    batch = rows(family, load(family, case, tmp_path))
    has_head = INDEX[family]["cases"][case]["head"] is not None
    got = runner(family).classes(batch) if has_head else runner(family).logits(batch)
    for n, result in enumerate(got):
        check(family, case, n, result)


@pytest.mark.parametrize(("family", "case"), REFUSED, ids=lambda part: part)
def test_refused(family: str, case: str, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=REFUSED[family, case]) as caught:
        load(family, case, tmp_path)
    assert caught.value.field


@pytest.mark.parametrize("mode", ["reference", "native", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed(family: str, mode: Mode, tmp_path: Path) -> None:
    """All kinds in one batch: every row as alone, which is as the library's."""
    mixed: list[tuple[str, int, PaddedRow]] = []
    for case in (case for of, case in SERVED if of == family):
        if INDEX[family]["cases"][case]["head"] is None:
            (tmp_path / case).mkdir()
            made = rows(family, load(family, case, tmp_path / case))
            mixed += [(case, n, row) for n, row in enumerate(made)]
    mixed += [("base", n, row) for n, row in enumerate(rows(family, None))]
    random.Random(family).shuffle(mixed)
    results = runner(family, mode).logits([row for _, _, row in mixed])
    for (case, n, _), logits in zip(mixed, results, strict=True):
        check(family, case, n, logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_engine(family: str, tmp_path: Path) -> None:
    """The same rows through the engine's own runner: prompts in chunks, then a few tokens."""
    engine = make_runner(runner(family).folder, torch.float32, capacity=48)
    made: list[tuple[str, int, Row]] = []
    for case in (case for of, case in SERVED if of == family):
        if INDEX[family]["cases"][case]["head"] is None:
            (tmp_path / case).mkdir()
            packed = place(engine, load(family, case, tmp_path / case))
            for n in range(INDEX[family]["rows"]):
                made.append((case, n, Row(expected(family)[f"ids.{n}"].tolist(), packed, case)))
    for start in range(0, len(made), SLOTS - 1):
        part = made[start : start + SLOTS - 1]
        generate(engine, [row for _, _, row in part], steps=3, chunk=7)
        for case, n, row in part:
            check(family, case, n, row.logits[0][None], last=True)


def test_pickled_files_are_the_same_delta(tmp_path: Path) -> None:
    """As the library saves by default: with the head's copy, aliases of one tensor under several names."""
    for case in ("seq_bn_default", "prefix", "ln_before"):
        source = tmp_path / case
        source.mkdir()
        for path in (FOLDER / "bert" / case).iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        (tmp_path / f"{case}-safe").mkdir()
        bert = runner("bert")
        pickled = read(files_of(source), bert.spec, bert.weights)
        assert pickled.digest == load("bert", case, tmp_path / f"{case}-safe").digest
