"""OpenDelta's files, and what is refused in them. That they mean what they mean there: tests/oracle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.formats.opendelta.modules import modules
from deltas.formats.opendelta.names import Names
from deltas.sites import BackboneSpec
from tests.unit.formats.opendelta_files import LORA, adapters, loras, queries, refused, spec_of, upload


@pytest.fixture(scope="module")
def llama() -> BackboneSpec:
    return spec_of("llama")


def test_a_lora(tmp_path: Path, llama: BackboneSpec) -> None:
    delta = read(upload(tmp_path, LORA, queries()), llama)
    (component,) = delta.components
    assert (delta.format, component.method, component.config) == ("opendelta", "lora", {"scale": 2.5})
    assert set(component.tensors) == {f"layers.{i}.attn.q/{side}" for i in range(2) for side in "AB"}
    assert delta.metadata == {"backbone_class": "LlamaForCausalLM", "opendelta_version": "0.3.0"}


def test_files_of_the_base_model_are_the_same_delta(tmp_path: Path, llama: BackboneSpec) -> None:
    full = read(upload(tmp_path, LORA, queries()), llama)
    bare = read(
        upload(tmp_path, LORA, {key.removeprefix("model."): t for key, t in queries().items()}), llama
    )
    assert full.digest == bare.digest


def test_both_weight_files_are_refused(tmp_path: Path, llama: BackboneSpec) -> None:
    upload(tmp_path, LORA, queries())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    files = DeltaFiles({path.name: path for path in tmp_path.iterdir()})
    assert refused(files, llama).field == "model.safetensors"


def test_a_damaged_pickle_is_refused(tmp_path: Path, llama: BackboneSpec) -> None:
    (tmp_path / "config.json").write_text('{"delta_type": "lora"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    files = DeltaFiles({path.name: path for path in tmp_path.iterdir()})
    assert refused(files, llama).field == "pytorch_model.bin"


@pytest.mark.parametrize(
    ("changes", "field", "kind"),
    [
        ({"delta_type": "diff_pruning"}, "delta_type", UnsupportedDelta),
        ({"delta_type": 3}, "delta_type", UnsupportedDelta),
        ({"strange": 1}, "strange", UnsupportedDelta),
        ({"bottleneck_dim": 3}, "bottleneck_dim", UnsupportedDelta),
        ({"lora_r": 0}, "lora_r", InvalidDelta),
        ({"lora_r": True}, "lora_r", InvalidDelta),
        ({"lora_r": 1 << 60}, "lora_r", InvalidDelta),
        ({"lora_r": 3}, "lora_r", InvalidDelta),
        ({"lora_alpha": "much"}, "lora_alpha", InvalidDelta),
        ({"modified_modules": []}, "modified_modules", InvalidDelta),
        ({"modified_modules": None}, "modified_modules", InvalidDelta),
        ({"modified_modules": "q_proj"}, "modified_modules", InvalidDelta),
        ({"modified_modules": [1]}, "modified_modules", InvalidDelta),
        ({"modified_modules": ["q_proj"] * 5000}, "modified_modules", InvalidDelta),
        ({"modified_modules": ["q" * 300]}, "modified_modules", InvalidDelta),
        ({"modified_modules": ["[r]q_proj"] * 17}, "modified_modules", UnsupportedDelta),
        ({"modified_modules": ["[r][b-a]_proj"]}, "modified_modules", InvalidDelta),
        ({"exclude_modules": "lm_head"}, "exclude_modules", InvalidDelta),
        ({"common_structure": True}, "common_structure", UnsupportedDelta),
        ({"common_structure": "yes"}, "common_structure", InvalidDelta),
    ],
)
def test_config_values_are_checked(
    tmp_path: Path, llama: BackboneSpec, changes: dict[str, Any], field: str, kind: type[DeltaError]
) -> None:
    files = upload(tmp_path, LORA | changes, queries())
    assert refused(files, llama, kind).field == field


def test_the_library_s_defaults_are_taken_for_missing_keys(tmp_path: Path, llama: BackboneSpec) -> None:
    config = {"delta_type": "lora", "modified_modules": ["q_proj"]}
    tensors = loras({f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in range(2)}, rank=8)
    assert read(upload(tmp_path, config, tensors), llama).components[0].config == {"scale": 2.0}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["k_proj"], "drop"),
        (["0.self_attn.q_proj"], "drop"),
        (["proj"], "drop"),  # not at a dot
        (["q_proj", "o_proj"], "no tensors"),
        (["[r]self_attn\\.(q|o)_proj"], "no tensors"),
        (["[r]model\\.layers\\.0\\.self_attn\\.q_proj"], "drop"),
    ],
)
def test_names_and_tensors_must_agree(
    tmp_path: Path, llama: BackboneSpec, names: list[str], says: str
) -> None:
    error = refused(upload(tmp_path, LORA | {"modified_modules": names}, queries()), llama)
    assert error.field == "modified_modules"
    assert says in str(error)


@pytest.mark.parametrize(
    "names",
    [
        ["q_proj"],
        ["self_attn.q_proj"],
        ["0.self_attn.q_proj", "[r]1\\.self_attn\\.q_pro[j-k]"],
        ["[r]q_\\w+"],
    ],
)
def test_names_that_agree(tmp_path: Path, llama: BackboneSpec, names: list[str]) -> None:
    read(upload(tmp_path, LORA | {"modified_modules": names}, queries()), llama)


def test_what_is_excluded_has_no_tensors(tmp_path: Path, llama: BackboneSpec) -> None:
    config = LORA | {"exclude_modules": ["model.layers.1"]}
    read(upload(tmp_path, config, queries(1)), llama)
    assert "drop" in str(refused(upload(tmp_path, config, queries()), llama))


@pytest.mark.parametrize("expression", ["(a+)+$", "(.*)*q_proj", ".*.*.*.*x", "(?=.*)*q_proj", "q_proj(?#"])
def test_hostile_expressions_take_no_time_and_decide_nothing(
    tmp_path: Path, llama: BackboneSpec, expression: str
) -> None:
    began = time.monotonic()
    read(upload(tmp_path, LORA | {"modified_modules": [f"[r]{expression}"]}, queries()), llama)
    config = {"delta_type": "parallel_adapter", "bottleneck_dim": 3, "modified_modules": [f"[r]{expression}"]}
    files = upload(tmp_path, config, adapters("model.layers.0.mlp", kind="parallel_adapter"))
    assert refused(files, llama, UnsupportedDelta).field == "modified_modules"
    assert time.monotonic() - began < 5


def test_an_expression_is_searched_once_as_the_library_does(llama: BackboneSpec) -> None:
    names = Names.of({"modified_modules": ["[r]layers\\.\\d"]}, llama)
    assert [path for path, module in modules(llama).items() if names.mean(module)] == [
        "model.layers.0",
        "model.layers.1",
    ]
    # the leftmost match ends too early, and a later one is not looked for
    assert not Names.of({"modified_modules": ["[r]_proj|q_proj"]}, llama).certain
    never = Names.of({"modified_modules": ["[r](self_attn|q_proj)"]}, llama)
    assert not never.mean(modules(llama)["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("model.layers.0.self_attn.q_proj.adapter.modulelist.down_proj.weight", "drop"),
        ("model.layers.0.self_attn.q_proj.bitfit.bias", "drop"),
        ("model.layers.0.self_attn.q_proj.lora.lora_C", "mean nothing"),
        ("model.layers.0.self_attn.q_proj.bias", "mean nothing"),  # this backbone has none
        ("model.layers.9.self_attn.q_proj.weight", "mean nothing"),
        ("classifier.weight", "mean nothing"),
        ("score.weight", "mean nothing"),  # of another class than the config's
        ("__proto__", "mean nothing"),
    ],
)
def test_every_tensor_must_mean_something(tmp_path: Path, llama: BackboneSpec, extra: str, says: str) -> None:
    error = refused(upload(tmp_path, LORA, queries() | {extra: torch.ones(32)}), llama)
    assert error.field == extra
    assert says in str(error)


def test_half_a_lora_is_refused(tmp_path: Path, llama: BackboneSpec) -> None:
    tensors = queries()
    del tensors["model.layers.1.self_attn.q_proj.lora.lora_B"]
    assert "layers.1.attn.q/B" in str(refused(upload(tmp_path, LORA, tensors), llama))


def test_wrong_shapes_name_the_file_s_tensor(tmp_path: Path, llama: BackboneSpec) -> None:
    key = "model.layers.1.self_attn.q_proj.lora.lora_B"
    assert refused(upload(tmp_path, LORA, queries() | {key: torch.ones(31, 2)}), llama).field == key


def test_a_lora_on_a_norm_is_refused(tmp_path: Path, llama: BackboneSpec) -> None:
    tensors = loras({f"model.layers.{i}.input_layernorm": (32, 32) for i in range(2)})
    error = refused(upload(tmp_path, LORA | {"modified_modules": ["input_layernorm"]}, tensors), llama)
    assert "no linear" in str(error)


def test_a_module_without_a_site_is_refused(tmp_path: Path, llama: BackboneSpec) -> None:
    tensors = loras({f"model.layers.{i}.mlp.act_fn": (48, 48) for i in range(2)})
    error = refused(
        upload(tmp_path, LORA | {"modified_modules": ["act_fn"]}, tensors), llama, UnsupportedDelta
    )
    assert error.field == "model.layers.0.mlp.act_fn"


def test_names_that_mean_nothing_leave_what_else_was_trained(tmp_path: Path, llama: BackboneSpec) -> None:
    tensors = {f"model.layers.{i}.input_layernorm.weight": torch.ones(32) for i in range(2)}
    (component,) = read(upload(tmp_path, LORA | {"modified_modules": ["c_attn"]}, tensors), llama).components
    assert component.method == "override"
    assert "no tensors" in str(refused(upload(tmp_path, LORA, tensors), llama))


def test_nothing_trained_is_refused(tmp_path: Path, llama: BackboneSpec) -> None:
    assert refused(upload(tmp_path, LORA, {}), llama).field == "model.safetensors"


def test_a_tied_embedding_is_replaced_everywhere(tmp_path: Path) -> None:
    config = {"delta_type": "bitfit", "modified_modules": ["attn@"], "common_structure": True}
    (override,) = read(
        upload(tmp_path, config, {"transformer.wte.weight": torch.ones(61, 32)}), spec_of("gpt2")
    ).components
    assert set(override.tensors) == {"embed/weight", "head/weight"}
    (override,) = read(
        upload(tmp_path, config, {"shared.weight": torch.ones(61, 32)}), spec_of("t5")
    ).components
    assert set(override.tensors) == {
        "encoder.embed/weight",
        "decoder.embed/weight",
        "head/weight",
    }


def test_two_values_for_one_weight_are_refused(tmp_path: Path) -> None:
    config = {"delta_type": "bitfit", "modified_modules": ["attn@"], "common_structure": True}
    tensors = {"transformer.wte.weight": torch.ones(61, 32), "lm_head.weight": torch.zeros(61, 32)}
    assert "mean nothing" in str(refused(upload(tmp_path, config, tensors), spec_of("gpt2")))


def test_conv1d_weights_are_turned(tmp_path: Path) -> None:
    weight = torch.randn(32, 48)
    config = {"delta_type": "bitfit", "modified_modules": ["ff@"], "common_structure": True}
    delta = read(upload(tmp_path, config, {"transformer.h.0.mlp.c_fc.weight": weight}), spec_of("gpt2"))
    assert torch.equal(delta.components[0].tensors["layers.0.mlp.up/weight"], weight.T)


def test_part_of_a_head_is_refused(tmp_path: Path) -> None:
    config = {
        "delta_type": "bitfit",
        "modified_modules": ["attn@"],
        "common_structure": True,
        "backbone_class": "BertForSequenceClassification",
    }
    tensors = {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    error = refused(upload(tmp_path, config, tensors), spec_of("bert"))
    assert error.field == "bert.pooler.dense.weight"
    whole = tensors | {
        "bert.pooler.dense.weight": torch.ones(32, 32),
        "bert.pooler.dense.bias": torch.ones(32),
    }
    (head,) = read(upload(tmp_path, config, whole), spec_of("bert")).components
    assert head.config == {
        "kind": "classify",
        "pooling": "first",
        "activations": ["tanh", "identity"],
        "labels": None,
    }
