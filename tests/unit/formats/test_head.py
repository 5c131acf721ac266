"""AdapterHub writes a copy of the language model's head beside an adapter: fine if it is the backbone's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from deltas.backbones import describe
from deltas.errors import UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.sites import BackboneSpec
from deltas.weights import FrozenTensors

FIXTURES = Path(__file__).parents[2] / "oracle" / "fixtures" / "adapterhub"


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    return describe(AutoConfig.from_pretrained(FIXTURES / "backbone"), "test")


def files_of(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


def test_the_backbones_own_head_is_no_change(spec: BackboneSpec) -> None:
    frozen = FrozenTensors(FIXTURES / "backbone")
    with_head = read(files_of(FIXTURES / "seq_bn_with_head"), spec, frozen)
    assert with_head.digest == read(files_of(FIXTURES / "seq_bn"), spec).digest


def test_a_trained_head_is_refused(spec: BackboneSpec, tmp_path: Path) -> None:
    paths = {path.name: path for path in (FIXTURES / "seq_bn_with_head").iterdir()}
    head = load_file(paths["model_head.safetensors"])["lm_head.weight"].clone()
    head[3, 5] += 0.01
    paths["model_head.safetensors"] = tmp_path / "model_head.safetensors"
    save_file({"lm_head.weight": head}, paths["model_head.safetensors"])
    with pytest.raises(UnsupportedDelta, match="differs from the backbone") as caught:
        read(DeltaFiles(paths), spec, FrozenTensors(FIXTURES / "backbone"))
    assert caught.value.field == "model_head.safetensors"


def test_other_tensors_in_the_heads_file_are_refused(spec: BackboneSpec, tmp_path: Path) -> None:
    paths = {path.name: path for path in (FIXTURES / "seq_bn_with_head").iterdir()}
    tensors = load_file(paths["model_head.safetensors"])
    paths["model_head.safetensors"] = tmp_path / "model_head.safetensors"
    save_file({**tensors, "score.weight": tensors["lm_head.weight"].clone()}, paths["model_head.safetensors"])
    with pytest.raises(UnsupportedDelta, match="only the backbone's own"):
        read(DeltaFiles(paths), spec, FrozenTensors(FIXTURES / "backbone"))
