"""What is refused in OpenDelta's adapters, compacters, prompts and prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats import read
from deltas.formats.opendelta.modules import modules
from deltas.sites import BackboneSpec
from tests.unit.formats.opendelta_files import adapters, refused, spec_of, upload


@pytest.fixture(scope="module")
def llama() -> BackboneSpec:
    return spec_of("llama")


ADAPTER = {"delta_type": "adapter", "bottleneck_dim": 3, "modified_modules": ["down_proj"]}


@pytest.mark.parametrize(
    ("changes", "field", "kind"),
    [
        ({"non_linearity": "mish"}, "non_linearity", UnsupportedDelta),
        ({"non_linearity": None}, "non_linearity", UnsupportedDelta),
        ({"bottleneck_dim": 4}, "bottleneck_dim", InvalidDelta),
    ],
)
def test_adapters_are_checked(
    tmp_path: Path, llama: BackboneSpec, changes: dict[str, Any], field: str, kind: type[DeltaError]
) -> None:
    tensors = adapters(*(f"model.layers.{i}.mlp.down_proj" for i in range(2)))
    assert read(upload(tmp_path, ADAPTER, tensors), llama).components[0].config["activation"] == "gelu_tanh"
    assert refused(upload(tmp_path, ADAPTER | changes, tensors), llama, kind).field == field


@pytest.mark.parametrize("name", ["q_proj", "gate_proj", "input_layernorm", "model.norm"])
def test_an_adapter_behind_something_else_than_a_sublayer_is_refused(
    tmp_path: Path, llama: BackboneSpec, name: str
) -> None:
    paths = [path for path in modules(llama) if path.endswith(name)]
    hidden = 48 if name == "gate_proj" else 32
    files = upload(tmp_path, ADAPTER | {"modified_modules": [name]}, adapters(*paths, hidden=hidden))
    assert refused(files, llama, UnsupportedDelta).field in paths


def test_inner_adapters_come_first(tmp_path: Path, llama: BackboneSpec) -> None:
    paths = [f"model.layers.{i}{end}" for i in range(2) for end in ("", ".mlp", ".mlp.down_proj")]
    config = ADAPTER | {"modified_modules": ["layers.0", "layers.1", "mlp", "down_proj"]}
    delta = read(upload(tmp_path, config, adapters(*paths)), llama)
    assert [component.config["reads"] for component in delta.components] == [
        "output",
        "output",
        "output+residual",
    ]
    assert all(set(c.sites()) == {"layers.0.mlp.out", "layers.1.mlp.out"} for c in delta.components)


@pytest.mark.parametrize(
    ("names", "reader", "kind"),
    [
        (["up_proj", "gate_proj"], "mlp.gate_proj", UnsupportedDelta),  # adds to up_proj's output
        (["q_proj", "down_proj"], "self_attn.q_proj", UnsupportedDelta),  # across sublayers
        (["mlp", "mlp"], "mlp.gate_proj", InvalidDelta),
        (["mlp", "act_fn"], "mlp", UnsupportedDelta),
    ],
)
def test_parallel_adapters_that_are_no_pair_are_refused(
    tmp_path: Path, llama: BackboneSpec, names: list[str], reader: str, kind: type[DeltaError]
) -> None:
    tensors = adapters(*(f"model.layers.{i}.{reader}" for i in range(2)), kind="parallel_adapter")
    config = {"delta_type": "parallel_adapter", "bottleneck_dim": 3, "modified_modules": names}
    assert refused(upload(tmp_path, config, tensors), llama, kind).field == "modified_modules"


def compacters(path: str, pieces: int = 2, width: int = 4) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for side, a, b in (("down", 32, width), ("up", width, 32)):
        sampler = f"{path}.compactor.{side}_sampler"
        tensors |= {
            f"{sampler}.phm_rule": torch.ones(pieces, pieces, pieces),
            f"{sampler}.W_left": torch.ones(pieces, a // pieces, 1),
            f"{sampler}.W_right": torch.ones(pieces, 1, b // pieces),
            f"{sampler}.b": torch.ones(b),
        }
    return tensors


@pytest.mark.parametrize(
    ("changes", "field", "kind"),
    [
        ({"learn_phm": False}, "learn_phm", UnsupportedDelta),
        ({"shared_phm_rule": True}, "shared_phm_rule", UnsupportedDelta),
        ({"shared_W_phm": True}, "shared_W_phm", UnsupportedDelta),
        ({"hypercomplex_division": 4}, "hypercomplex_division", InvalidDelta),
        ({"phm_rank": 2}, "phm_rank", InvalidDelta),
        ({"reduction_factor": 4}, "reduction_factor", InvalidDelta),
        ({"factorized_phm": False}, "down_sampler.W", InvalidDelta),
        ({"factorized_phm_rule": True}, "down_sampler.phm_rule", InvalidDelta),
        ({"use_bias_up_sampler": False}, "up_sampler.b", InvalidDelta),
        ({"factorized_phm": 1}, "factorized_phm", UnsupportedDelta),
    ],
)
def test_compacters_are_checked(
    tmp_path: Path, llama: BackboneSpec, changes: dict[str, Any], field: str, kind: type[DeltaError]
) -> None:
    config = {
        "delta_type": "compacter",
        "modified_modules": ["1.mlp.down_proj"],
        "reduction_factor": 8,
        "hypercomplex_division": 2,
    }
    tensors = compacters("model.layers.1.mlp.down_proj")
    assert read(upload(tmp_path, config, tensors), llama).methods == ["compacter"]
    assert refused(upload(tmp_path, config | changes, tensors), llama, kind).field == field


def test_low_rank_adapters_are_of_rank_one(tmp_path: Path, llama: BackboneSpec) -> None:
    path = "model.layers.1.mlp.down_proj.low_rank_adapter"
    tensors = {
        f"{path}.down_sampler.W_left": torch.ones(32, 1),
        f"{path}.down_sampler.W_right": torch.ones(1, 4),
        f"{path}.down_sampler.b": torch.ones(4),
        f"{path}.up_sampler.W_left": torch.ones(4, 1),
        f"{path}.up_sampler.W_right": torch.ones(1, 32),
        f"{path}.up_sampler.b": torch.ones(32),
    }
    config = {
        "delta_type": "low_rank_adapter",
        "modified_modules": ["1.mlp.down_proj"],
        "reduction_factor": 8,
        "low_rank_rank": 1,
    }
    assert read(upload(tmp_path, config, tensors), llama).methods == ["low_rank_adapter"]
    error = refused(upload(tmp_path, config | {"low_rank_rank": 2}, tensors), llama, UnsupportedDelta)
    assert error.field == "low_rank_rank"
    assert (
        refused(upload(tmp_path, config | {"reduction_factor": 4}, tensors), llama).field
        == "reduction_factor"
    )


@pytest.mark.parametrize(
    ("family", "key", "length", "field"),
    [
        ("llama", "soft_prompt_layer.soft_embeds", 4, "soft_token_num"),
        ("llama", "encoder.soft_prompt_layer.soft_embeds", 3, "soft_prompt_layer"),
        ("t5", "soft_prompt_layer.soft_embeds", 3, "encoder.soft_prompt_layer"),
    ],
)
def test_soft_prompts_are_checked(tmp_path: Path, family: str, key: str, length: int, field: str) -> None:
    config = {"delta_type": "soft_prompt", "soft_token_num": 3, "modified_modules": ["root"]}
    assert refused(upload(tmp_path, config, {key: torch.ones(length, 32)}), spec_of(family)).field == field


PREFIX = {
    "delta_type": "prefix",
    "prefix_token_num": 3,
    "reparameterize": False,
    "modified_modules": ["attn@"],
    "common_structure": True,
}


def prefixes(*paths: str) -> dict[str, Tensor]:
    return {f"{path}.prefix.past_{side}": torch.ones(3, 32) for path in paths for side in ("key", "value")}


def network(path: str, outputs: int) -> dict[str, Tensor]:
    shapes = {
        "wte.weight": (3, 6),
        "control_trans.0.weight": (7, 6),
        "control_trans.0.bias": (7,),
        "control_trans.2.weight": (outputs, 7),
        "control_trans.2.bias": (outputs,),
    }
    return {f"{path}.reparams.{name}": torch.ones(shape) for name, shape in shapes.items()}


GPT2 = ["transformer.h.0.attn", "transformer.h.1.attn"]


@pytest.mark.parametrize(
    ("changes", "tensors", "field", "kind"),
    [
        ({"prefix_token_num": 4}, prefixes(*GPT2), "prefix_token_num", InvalidDelta),
        ({"modified_modules": ["ff@"]}, prefixes(*GPT2), "modified_modules", UnsupportedDelta),
        (
            {"modified_modules": ["attn@", "attn@.proj@"]},
            prefixes(*GPT2),
            "modified_modules",
            UnsupportedDelta,
        ),
        ({}, prefixes(GPT2[0]), "modified_modules", InvalidDelta),
        ({}, prefixes(*GPT2, "transformer.h.1.mlp"), "transformer.h.1.mlp", UnsupportedDelta),
        (
            {},
            prefixes(*GPT2) | network(GPT2[0], 128),
            f"{GPT2[0]}.reparams.control_trans.0.bias",
            InvalidDelta,
        ),
        (
            {"modified_modules": ["1.attn"], "common_structure": False},
            prefixes(GPT2[1]),
            "modified_modules",
            UnsupportedDelta,
        ),
        (
            {"reparameterize": True, "embed_dim": 5, "mid_dim": 7},
            network(GPT2[0], 128),
            "embed_dim",
            InvalidDelta,
        ),
        (
            {"reparameterize": True, "embed_dim": 6, "mid_dim": 6},
            network(GPT2[0], 128),
            "mid_dim",
            InvalidDelta,
        ),
        (
            {"reparameterize": True, "embed_dim": 6, "mid_dim": 7},
            network(GPT2[1], 128),
            GPT2[0],
            InvalidDelta,
        ),
        (
            {"reparameterize": True, "embed_dim": 6, "mid_dim": 7},
            network(GPT2[0], 64),
            f"{GPT2[0]}.reparams.control_trans.2.weight",
            InvalidDelta,
        ),
        (
            {"reparameterize": True, "modified_modules": ["[r](attn)+"]},
            network(GPT2[0], 128),
            "modified_modules",
            UnsupportedDelta,
        ),
    ],
)
def test_prefixes_are_checked(
    tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Tensor], field: str, kind: type[DeltaError]
) -> None:
    gpt2 = spec_of("gpt2")
    assert read(upload(tmp_path, PREFIX, prefixes(*GPT2)), gpt2).methods == ["prefix"]
    assert refused(upload(tmp_path, PREFIX | changes, tensors), gpt2, kind).field == field


def test_half_a_prefix_is_refused(tmp_path: Path) -> None:
    tensors = prefixes(*GPT2)
    missing = f"{GPT2[1]}.prefix.past_value"
    del tensors[missing]
    assert refused(upload(tmp_path, PREFIX, tensors), spec_of("gpt2")).field == missing


def test_prefixes_of_cross_attention_are_refused(tmp_path: Path) -> None:
    config = PREFIX | {"modified_modules": ["EncDecAttention"], "common_structure": False}
    tensors = prefixes(*(f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)))
    assert (
        refused(upload(tmp_path, config, tensors), spec_of("t5"), UnsupportedDelta).field
        == "modified_modules"
    )
