"""AdapterHub's other kinds of adapters, its heads and compositions: what a changed file or config is refused with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from tests.unit.formats.uploads import FIXTURES, Upload, in_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG, HEAD = "head_config.json", "model_head.safetensors"
SETUP, FUSION = "adapter_setup.json", "first,second/adapter_fusion_config.json"


@cache
def upload(case: str, family: str) -> Upload:
    return in_folder(case, family, FIXTURES / "adapterhub_table" / family / case)


def edited(made: Upload, file: str, **changes: Any) -> Upload:
    """With other values in a JSON file; ``config__r`` is key r of the object under ``config``."""
    content = json.loads(made.files[file])
    for path, value in changes.items():
        *outer, key = path.split("__")
        target = content
        for name in outer:
            target = target[name]
        target[key] = value
    return made.with_file(file, json.dumps(content).encode())


def retensored(made: Upload, file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Upload:
    tensors = change(load(made.files[file]))
    return made.with_file(file, save({key: tensor.contiguous() for key, tensor in tensors.items()}))


def refused(made: Upload, folder: Path, kind: type[DeltaError] = DeltaError) -> DeltaError:
    with pytest.raises(kind) as caught:
        made.read(folder)
    assert caught.value.field
    return caught.value


@pytest.mark.parametrize(
    ("case", "family", "changes", "field"),
    [
        ("lora", "llama", {"config__r": 3}, "r"),
        ("lora", "llama", {"config__r": 0}, "r"),
        ("lora", "llama", {"config__r": 4.0}, "r"),
        ("lora", "llama", {"config__alpha": "4"}, "alpha"),
        ("lora", "llama", {"config__attn_matrices": ["q", "o"]}, "attn_matrices"),
        ("lora", "llama", {"config__attn_matrices": "qv"}, "attn_matrices"),
        ("lora", "llama", {"config__attn_matrices": []}, "config"),
        (
            "lora",
            "llama",
            {"config__attn_matrices": ["q"]},
            "model.layers.0.self_attn.v_proj.loras.tone.lora_A",
        ),
        ("lora", "llama", {"config__composition_mode": "times"}, "composition_mode"),
        ("lora", "llama", {"config__composition_mode": "scale"}, "composition_mode"),
        ("lora", "llama", {"config__use_gating": True}, "use_gating"),
        ("lora", "llama", {"config__leave_out": "1"}, "leave_out"),
        ("lora", "llama", {"config__later": 1}, "later"),
        ("lora", "llama", {"name": "other"}, "model.layers.0.self_attn.q_proj.loras.other.lora_A"),
        ("lora", "gpt2", {"config__use_dora": True}, "use_dora"),
        ("lora", "gpt2", {"config__vera_d": 0.1}, "vera_d"),
        ("lora", "gpt2", {"config__attn_matrices": ["q", "k", "v"]}, "r"),
        ("lora_gated", "bert", {"config__use_dora": True}, "use_dora"),
        ("mtl_lora", "llama", {"config__task_specific_matrix_type": "linear"}, "task_specific_matrix_type"),
        ("mtl_lora", "llama", {"config__weights_sharpness": 0}, "sharpness"),
        ("ia3", "llama", {"config__r": 2}, "composition_mode"),
        (
            "prefix",
            "llama",
            {"config__prefix_length": 4},
            "model.prefix_tuning.prefix_tunings.tone.self_prefix.wte.weight",
        ),
        ("prefix", "llama", {"config__prefix_length": "3"}, "prefix_length"),
        ("prefix", "llama", {"config__leave_out": [0, 1]}, "config"),
        ("prefix", "llama", {"config__non_linearity": "mish"}, "non_linearity"),
        ("prefix_gates", "bert", {"config__shared_gating": True}, "shared_gating"),
        ("prompt", "bert", {"config__prompt_length": 4}, "prompt_length"),
        ("prompt", "bert", {"config__combine": "suffix"}, "combine"),
        ("compacter", "llama", {"config__phm_dim": 2}, "phm_dim"),
        ("compacter", "llama", {"config__reduction_factor": 4}, "reduction_factor"),
        ("compacter_shared", "llama", {"config__reduction_factor": 4}, "reduction_factor"),
        ("gated_bn", "bert", {"model_type": "roberta"}, "model_type"),
        ("mam", "llama", {"config__configs": []}, "configs"),
        ("mam", "llama", {"config__configs": [{"architecture": "union"}]}, "architecture"),
        ("mam", "llama", {"config__more": 1}, "more"),
        ("head_tagging", "bert", {"hidden_size": 31}, "hidden_size"),
    ],
)
def test_configs_that_do_not_fit(
    case: str, family: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    assert refused(edited(upload(case, family), CONFIG, **changes), tmp_path).field == field


@pytest.mark.parametrize(
    ("case", "family", "inside", "instead"),
    [
        ("double_seq_bn", "llama", "model.", ""),
        ("lora_all", "gpt2", "transformer.", ""),
        ("prompt", "bert", "bert.", ""),
        ("lora_all", "t5", "", "transformer."),
    ],
)
def test_the_base_models_name_in_front_of_keys_is_free(
    case: str, family: str, inside: str, instead: str, tmp_path: Path
) -> None:
    """It is missing in files of models without a head; ``AutoAdapterModel`` gives T5 one."""
    made = upload(case, family)
    renamed = retensored(
        made, WEIGHTS, lambda t: {instead + key.removeprefix(inside): tensor for key, tensor in t.items()}
    )
    assert renamed.read(tmp_path).digest == made.read(tmp_path).digest


def test_a_repeated_tensor_must_have_one_value(tmp_path: Path) -> None:
    for case, key in (
        (
            "prefix_flat",
            "bert.encoder.layer.1.attention.self.prefix_tuning.pool.prefix_tunings.tone.self_prefix.control_trans",
        ),
        ("ln_before", "bert.encoder.layer.0.output.adapters.tone.adapter_down.0.weight"),
    ):
        made = upload(case, "bert")
        without = retensored(made, WEIGHTS, lambda t, k=key: {n: v for n, v in t.items() if n != k})  # type: ignore[misc]
        assert without.read(tmp_path).digest == made.read(tmp_path).digest
        other = retensored(made, WEIGHTS, lambda t, k=key: t | {k: t[k] + 1})  # type: ignore[misc]
        assert refused(other, tmp_path, InvalidDelta).field == key


def test_what_old_versions_meant(tmp_path: Path) -> None:
    def scale(case: str, **changes: Any) -> object:
        delta = edited(upload(case, "llama"), CONFIG, **changes).read(tmp_path)
        return delta.components[0].config.get("scale", 1.0)

    assert scale("lora", config__alpha=10) == 2.5
    assert scale("lora", config__alpha=10, version="adapters.1.1.0") == 2.5
    for old in ("adapters.1.0.1", "adapters.1.0", "adapters.0.2.2"):
        assert scale("lora", config__alpha=10, version=old) == 1.0
        assert scale("ia3", config__alpha=3, version=old) == 1.0
    assert scale("ia3", config__alpha=3) == 3.0


def test_what_a_t5_shares_is_not_in_its_files(tmp_path: Path) -> None:
    made = upload("compacter_own", "t5")
    asked = edited(made, CONFIG, config__shared_phm_rule=True)
    assert "does not save what the layers of a T5 share" in str(refused(asked, tmp_path, InvalidDelta))


@pytest.mark.parametrize(
    ("file", "changes", "field"),
    [
        (HEAD_CONFIG, {"config__head_type": "multiple_choice"}, "head_type"),
        (HEAD_CONFIG, {"config__use_pooler": True}, "use_pooler"),
        (HEAD_CONFIG, {"config__layers": 0}, "layers"),
        (HEAD_CONFIG, {"config__layers": 1}, "heads.tone.4.bias"),
        (HEAD_CONFIG, {"config__layers": 3}, "heads.tone.7.weight"),
        (HEAD_CONFIG, {"config__activation_function": "mish"}, "activation_function"),
        (HEAD_CONFIG, {"config__label2id": {"calm": 0}}, "labels"),
        (HEAD_CONFIG, {"config__label2id": {"calm": 0, "angry": 0, "sad": 1}}, "label2id"),
        (HEAD_CONFIG, {"config__more": 1}, "more"),
        (HEAD_CONFIG, {"config": None}, HEAD_CONFIG),
        (HEAD_CONFIG, {"config": "x"}, "config"),
        (HEAD_CONFIG, {"name": "other"}, "heads.other.1.weight"),
    ],
)
def test_heads_that_do_not_fit(file: str, changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    assert refused(edited(upload("head_classification", "bert"), file, **changes), tmp_path).field == field


def test_heads_have_their_labels_in_order(tmp_path: Path) -> None:
    head = upload("head_classification", "bert").read(tmp_path).components[-1]
    assert head.method == "head"
    assert head.config["labels"] == ["calm", "angry", "sad"]
    assert head.config["activations"] == ["tanh", "identity"]
    one = edited(upload("static_sequence", "llama"), HEAD_CONFIG, num_labels=1)
    assert one.read(tmp_path).components[-1].config["kind"] == "regress"


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    for name in (HEAD_CONFIG, HEAD):
        made = upload("head_classification", "bert")
        half = Upload(made.name, made.family, {n: d for n, d in made.files.items() if n != name})
        assert "a head has" in str(refused(half, tmp_path, UnsupportedDelta))


def single(name: str) -> dict[str, Any]:
    return {"type": "single", "children": [name]}


@pytest.mark.parametrize(
    ("file", "changes", "field"),
    [
        (SETUP, {"head_setup": "first"}, "head_setup"),
        (SETUP, {"more": 1}, "more"),
        (SETUP, {"adapter_setup__type": "Parallel"}, "adapter_setup"),
        (SETUP, {"adapter_setup__type": ["Fuse"]}, "adapter_setup"),
        (SETUP, {"adapter_setup__children": []}, "adapter_setup"),
        (SETUP, {"adapter_setup__children": [single("first")]}, SETUP),
        (SETUP, {"adapter_setup__children": [single("first"), single("../x")]}, SETUP),
        (SETUP, {"adapter_setup__children": [single("first"), single("first")]}, SETUP),
        (
            SETUP,
            {"adapter_setup__children": [{"type": "Stack", "children": [single("first")]}]},
            "adapter_setup",
        ),
        (SETUP, {"adapter_setup__kwargs": {"weights": [1, 2]}}, "adapter_setup"),
        (SETUP, {"adapter_setup": None}, "adapter_setup"),
        (FUSION, {"config__temperature": True}, "temperature"),
        (FUSION, {"config__query": False}, "first,second"),
        (FUSION, {"adapter_names": ["second", "first"]}, "adapter_names"),
        (FUSION, {"config__later": 1}, "later"),
        (FUSION, {"name": "x"}, "missing"),
        ("first/adapter_config.json", {"name": "second"}, "name"),
        ("first/adapter_config.json", {"config__use_gating": True}, "use_gating"),
        ("first/adapter_config.json", {"config__mh_adapter": True}, "missing"),
        ("second/adapter_config.json", {"config__architecture": "lora"}, "architecture"),
    ],
)
def test_compositions_that_do_not_fit(file: str, changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    error = refused(edited(upload("fuse", "llama"), file, **changes), tmp_path)
    if field in ("missing", "first,second"):  # a tensor's name
        assert "adapters" in str(error.field) or "adapter_fusion_layer" in str(error.field)
    else:
        assert error.field == field


def test_no_file_of_a_composition_is_ignored(tmp_path: Path) -> None:
    made = upload("stack", "llama")
    for name in (
        "third/adapter_config.json",
        "first/more.json",
        "README/x",
        "first/deep/adapter_config.json",
    ):
        assert name in str(refused(made.with_file(name, b"{}"), tmp_path, InvalidDelta))
    gone = Upload(
        made.name, made.family, {n: d for n, d in made.files.items() if n != "first/adapter_config.json"}
    )
    assert refused(gone, tmp_path, InvalidDelta).field == "first/adapter_config.json"
    outside = Upload(made.name, made.family, {n: d for n, d in made.files.items() if n != SETUP})
    assert refused(outside, tmp_path, InvalidDelta).field == "file"


def test_a_compositions_copy_of_the_head_must_be_the_backbones(tmp_path: Path) -> None:
    made = upload("fuse", "llama")
    file = f"first/{HEAD}"
    changed = retensored(made, file, lambda t: {key: tensor + 1 for key, tensor in t.items()})
    assert refused(changed, tmp_path, UnsupportedDelta).field == file


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    made = upload("stack", "llama")
    own = load(made.files["first/adapter.safetensors"])
    both = retensored(made, "second/adapter.safetensors", lambda t: t | own)
    assert "both hold" in str(refused(both, tmp_path, InvalidDelta))


def test_lora_of_a_fused_layer_is_cut_into_its_parts(tmp_path: Path) -> None:
    made = upload("lora_all", "gpt2")
    tensors = load(made.files[WEIGHTS])
    delta = made.read(tmp_path)
    stem, site = "transformer.h.1.attn.c_attn.loras.tone", "layers.1.attn"
    for place, leaf in enumerate("qkv"):
        part = delta.components[0].at(f"{site}.{leaf}")
        assert torch.equal(part["A"], tensors[f"{stem}.lora_A"][3 * place : 3 * place + 3])
        assert torch.equal(part["B"], tensors[f"{stem}.lora_B"][32 * place : 32 * place + 32])
    short = retensored(made, WEIGHTS, lambda t: t | {f"{stem}.lora_B": t[f"{stem}.lora_B"][:-1]})
    assert refused(short, tmp_path, InvalidDelta).field == f"{stem}.lora_B"
