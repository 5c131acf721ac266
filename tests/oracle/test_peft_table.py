"""Every PEFT case on every architecture it has: read from PEFT's own files, our logits are PEFT's to 1e-5 relative."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, PeftType
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file
from torch import Tensor

from deltas.errors import DeltaError
from deltas.formats import DeltaFiles, read
from deltas.formats import peft as reader
from deltas.weights import FrozenTensors
from tests.oracle.padded import PaddedRow, PaddedRunner
from tests.oracle.peft_table import (
    CASES,
    FAMILIES,
    REFUSED,
    REFUSED_TYPES,
    ROWS,
    Case,
    Family,
    Refused,
    backbone_logits,
    cells,
    load_delta,
    logits,
    save_delta,
)

TOLERANCE = 1e-5
MATTERS = 0.01
"""What a delta of the table must change at least, relative to the largest logit."""

CELLS = cells(CASES)


@cache
def runner(family: str) -> PaddedRunner:
    return PaddedRunner(family)


def upload(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


@pytest.mark.parametrize(
    ("case", "family"), CELLS, ids=[f"{case.name}-{family.name}" for case, family in CELLS]
)
def test_gives_pefts_logits(case: Case, family: Family, tmp_path: Path) -> None:
    compare(case, family, tmp_path)


def compare(case: Case, family: Family, tmp_path: Path) -> None:
    save_delta(case, family, tmp_path, seed=1)
    model, ours = load_delta(family, tmp_path), runner(family.name)
    delta = read(upload(tmp_path), ours.spec, ours.weights)
    placed = ours.place(delta)
    rows = [PaddedRow(row.ids, placed, row.decoder_ids or None) for row in ROWS]
    for row, own, got in zip(ROWS, backbone_logits(family.name), ours.logits(rows), strict=True):
        wanted = logits(model, row)
        assert torch.isfinite(wanted).all()
        largest = float(wanted.abs().max())
        assert float((got - wanted).abs().max()) <= TOLERANCE * largest
        assert float((own - wanted).abs().max()) >= MATTERS * largest


class Extension:
    """BOFT's CUDA extension, without which PEFT makes one factor: blocks ``[factors, n, m, m]`` on the diagonal."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*part) for part in blocks])]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("factors", [2, 3])
def test_butterfly_factors(
    factors: int, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: Extension)

    def make(family: Family) -> BOFTConfig:
        return BOFTConfig(
            boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=list(family.query_value)
        )

    compare(Case("butterfly", "BOFT", make), FAMILIES[family], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(tensor) for key, tensor in tensors.items() if "boft_R" in key} == {factors}


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_is_refused_by_name(refused: Refused, tmp_path: Path) -> None:
    for name in refused.families:
        folder = tmp_path / name
        save_delta(Case(refused.name, "", refused.make), FAMILIES[name], folder)
        with pytest.raises(DeltaError) as caught:
            read(upload(folder), runner(name).spec, FrozenTensors(runner(name).folder))
        assert caught.value.field == refused.field


def test_every_type_of_the_library_is_in_the_table() -> None:
    served = {case.kind for case in CASES}
    assert served | set(REFUSED_TYPES) == {kind.value for kind in PeftType}
    assert not served & set(REFUSED_TYPES)
    assert served == set(reader.TYPES)
    assert set(REFUSED_TYPES) == set(reader.REFUSED)


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert set(case.excluded) <= set(FAMILIES)
        assert all(case.excluded.values())
