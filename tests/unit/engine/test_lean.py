"""The lean pass over a decoder's layers gives what Hugging Face's own forward pass gives, deltas included.

It rounds where that rounds; only the last bit of an exponential in float32 may differ.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltas.errors import DeltaError
from server.engine import lean
from server.engine.runner import Runner
from tests import deltas_of_every_kind as every
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.unit.backbones import tiny

STEPS = 3
LENGTHS = (1, 2, 30, 5, 17, 33)


def rows_of(runner: Runner, kinds: dict[str, int]) -> list[Row]:
    spec = runner.backbone.spec
    rows = [Row(tokens(3 + i, length)) for i, length in enumerate(LENGTHS)]
    for i, (kind, seed) in enumerate(kinds.items()):
        delta = place(runner, every.make(spec, kind, seed))
        rows.append(Row(tokens(i, LENGTHS[i % len(LENGTHS)]), delta, kind))
    return rows


def tokens(seed: int, length: int) -> list[int]:
    return torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", [n for n in sorted(tiny.CONFIGS) if tiny.family_of(n) in lean.FAMILIES])
def test_equal_to_hugging_face(name: str, dtype: torch.dtype, close: float, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    ours, theirs = (make_runner(folder, dtype, capacity=tiny.POSITIONS) for _ in range(2))
    assert ours.lean_body is not None
    theirs.lean_body = None
    kinds: dict[str, int] = {}
    for kind in every.served(ours.backbone.spec):
        try:
            place(ours, every.make(ours.backbone.spec, kind, 5))
        except DeltaError:
            continue  # a kind that this backbone or dtype has no place for
        kinds[kind] = 5
    assert len(kinds) > 40
    found = rows_of(ours, kinds), rows_of(theirs, kinds)
    for runner, rows in zip((ours, theirs), found, strict=True):
        for first in range(0, len(rows), 28):
            generate(runner, rows[first : first + 28], STEPS, chunk=37)
    for mine, wanted in zip(*found, strict=True):
        assert dtype is torch.bfloat16 or mine.tokens == wanted.tokens, mine.name
        assert same(mine.logits[0], wanted.logits[0]) < close, mine.name
        if mine.tokens == wanted.tokens:
            assert same(mine.logits[-1], wanted.logits[-1]) < close, mine.name


def test_other_families_and_activations_keep_hugging_faces(tmp_path: Path) -> None:
    folders = {name: tiny.save(name, tmp_path / name) for name in tiny.CONFIGS}
    for name, folder in folders.items():
        runner = make_runner(folder, torch.float32, capacity=tiny.POSITIONS)
        assert (runner.lean_body is None) == (tiny.family_of(name) not in lean.FAMILIES)
    dense = make_runner(folders["qwen2"], torch.float32, "dense", capacity=tiny.POSITIONS)
    assert dense.lean_body is None  # there are no kernels
