"""Makers of OpenDelta's files, and what becomes of wrong ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from deltas.backbones import describe
from deltas.errors import DeltaError, InvalidDelta
from deltas.formats import DeltaFiles, read
from deltas.sites import BackboneSpec

BACKBONES = Path(__file__).parents[2] / "oracle" / "fixtures" / "backbones"
LORA = {
    "delta_type": "lora",
    "lora_r": 2,
    "lora_alpha": 5,
    "modified_modules": ["q_proj"],
    "exclude_modules": ["lm_head"],
    "common_structure": None,
    "backbone_class": "LlamaForCausalLM",
    "opendelta_version": "0.3.0",
}


def spec_of(family: str) -> BackboneSpec:
    return describe(AutoConfig.from_pretrained(BACKBONES / family), "test")


def loras(paths: Mapping[str, tuple[int, int]], rank: int = 2) -> dict[str, Tensor]:
    """Path -> (in, out), as OpenDelta's keys."""
    return {
        f"{path}.lora.lora_{side}": torch.ones((rank, sizes[0]) if side == "A" else (sizes[1], rank))
        for path, sizes in paths.items()
        for side in "AB"
    }


def queries(layers: int = 2) -> dict[str, Tensor]:
    return loras({f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in range(layers)})


def adapters(*paths: str, kind: str = "adapter", width: int = 3, hidden: int = 32) -> dict[str, Tensor]:
    return {
        f"{path}.{kind}.modulelist.{linear}.{name}": torch.ones(shape)
        for path in paths
        for linear, name, shape in (
            ("down_proj", "weight", (width, hidden)),
            ("down_proj", "bias", (width,)),
            ("up_proj", "weight", (hidden, width)),
            ("up_proj", "bias", (hidden,)),
        )
    }


def upload(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "model.safetensors"
) -> DeltaFiles:
    """The files of one delta, the tensors in a safetensors file."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return DeltaFiles({"config.json": folder / "config.json", name: folder / name})


def refused(files: DeltaFiles, spec: BackboneSpec, kind: type[DeltaError] = InvalidDelta) -> DeltaError:
    with pytest.raises(kind) as caught:
        read(files, spec)
    assert type(caught.value) is kind
    return caught.value
