"""Native files with indices: read as int64 whatever they were, and refused where they point outside the backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deltas.delta import Delta
from deltas.errors import DeltaError
from deltas.formats import DeltaFiles, read
from deltas.sites import BackboneSpec

Q = "layers.0.attn.q"


def loaded(path: Path, spec: BackboneSpec, indices: Tensor, values: Tensor) -> Delta:
    manifest = {"version": 1, "components": [{"method": "diff_pruning", "config": {}}]}
    tensors = {f"0/{Q}/indices": indices, f"0/{Q}/values": values}
    save_file(tensors, path / "delta.safetensors", {"deltaserve": json.dumps(manifest)})
    return read(DeltaFiles({"delta.safetensors": path / "delta.safetensors"}), spec)


def test_indices_of_32_bits_are_the_same_delta(tmp_path: Path, spec: BackboneSpec) -> None:
    indices, values = torch.tensor([[0, 2], [3, 1]]), torch.randn(2)
    wide, narrow = (loaded(tmp_path, spec, i, values) for i in (indices, indices.int()))
    assert wide.digest == narrow.digest
    assert narrow.components[0].tensors[f"{Q}/indices"].dtype == torch.int64


@pytest.mark.parametrize(
    ("indices", "values", "wrong", "message"),
    [
        (torch.tensor([[0], [1 << 40]]), torch.ones(1), "indices", "outside 0"),
        (torch.tensor([[-1], [0]]), torch.ones(1), "indices", "outside 0"),
        (torch.tensor([[0.0], [1.0]]), torch.ones(1), "indices", "not an integer"),
        (torch.tensor([[0], [1]]), torch.ones(1, dtype=torch.int64), "values", "not a float"),
        (torch.tensor([[0], [1]]), torch.ones(2), "values", "shape"),
    ],
)
def test_the_wrong_tensor_is_named(
    tmp_path: Path, spec: BackboneSpec, indices: Tensor, values: Tensor, wrong: str, message: str
) -> None:
    with pytest.raises(DeltaError, match=message) as error:
        loaded(tmp_path, spec, indices, values)
    assert error.value.field in (f"0/{Q}/{wrong}", f"{Q}/{wrong}")
