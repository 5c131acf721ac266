"""PEFT's files that cannot be served exactly are refused, naming the key or the tensor."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltas.delta import Delta
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.formats import peft as reader
from deltas.methods import lower
from deltas.sites import BackboneSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def files_in(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


def key_of(layer: int, side: str, module: str = "self_attn.q_proj") -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"


def refused(folder: Path, spec: BackboneSpec, kind: type[DeltaError]) -> DeltaError:
    with pytest.raises(kind) as caught:
        read(files_in(folder), spec)
    assert caught.value.field
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", "yes"),
        ("bias", "some"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", 1),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"x": 1}),
        ("arrow_config", {"top_k": 1}),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["mlp.experts"]),
        ("use_qalora", True),
        ("use_bdlora", {"blocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("task_type", "SEQ_CLS"),
        ("task_type", "QUESTION_ANS"),
        *(("peft_type", kind) for kind in reader.REFUSED),
        ("peft_type", "A_LATER_TYPE"),
        ("peft_type", ["LORA"]),
        ("peft_type", None),
        ("a_later_option", 1),
        ("use_rslora", "yes"),
        ("rank_pattern", {"(q|q)*": 2}),
        ("rank_pattern", {".*.*.*q_proj": 2}),
        ("rank_pattern", {f".*{i}": 2 for i in range(17)}),
    ],
)
def test_unserved_options_are_refused_by_name(saved: Path, spec: BackboneSpec, key: str, value: Any) -> None:
    change_config(saved, **{key: value})
    error = refused(saved, spec, UnsupportedDelta)
    assert error.field == key
    assert key in str(error) or key == "peft_type"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("r", 3, "r"),
        ("r", 0, "r"),
        ("r", 10**12, "r"),
        ("r", -2, "r"),
        ("r", True, "r"),
        ("r", "2", "r"),
        ("r", 10**400, "r"),
        ("lora_alpha", None, "lora_alpha"),
        ("lora_alpha", "16", "lora_alpha"),
        ("rank_pattern", {"q_proj": 3}, "rank_pattern"),
        ("rank_pattern", {"q_proj": "2"}, "rank_pattern"),
        ("rank_pattern", {"q" * 300: 2}, "rank_pattern"),
        ("rank_pattern", {"": 2}, "rank_pattern"),
        ("rank_pattern", ["q_proj"], "rank_pattern"),
        ("alpha_pattern", {"[z-a]": 2}, "alpha_pattern"),
        ("target_modules", ["q_proj", "v_proj"], "target_modules"),
        ("target_modules", ["v_proj"], "target_modules"),
        ("target_modules", ["proj"], "target_modules"),
        ("target_modules", [1], "target_modules"),
        ("target_modules", {"q_proj": 1}, "target_modules"),
        ("modules_to_save", "lm_head", "modules_to_save"),
        ("modules_to_save", [""], "modules_to_save"),
        ("use_bdlora", {"nblocks": 0}, "use_bdlora"),
        ("use_bdlora", {"nblocks": 3, "target_modules_bd_b": ["q_proj"]}, key_of(0, "B")),
        # What the config names and the file does not hold.
        ("use_dora", True, key_of(0, "magnitude_vector").removesuffix(".weight")),
        ("lora_bias", True, key_of(0, "B").replace("weight", "bias")),
        ("bias", "all", "bias"),
        ("bias", "lora_only", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("modules_to_save", ["self_attn"], "modules_to_save"),
        ("trainable_token_indices", [1], "trainable_token_indices"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "trainable_token_indices"),
        *(("peft_type", kind, "") for kind in sorted(reader.TYPES.keys() - {"LORA"})),
    ],
)
def test_a_config_that_lies_is_refused(
    saved: Path, spec: BackboneSpec, key: str, value: Any, field: str
) -> None:
    if (
        key == "peft_type"
    ):  # other options would be refused before the tensors, which another type cannot have
        (saved / CONFIG).write_text(json.dumps({"task_type": "CAUSAL_LM"}))
    change_config(saved, **{key: value})
    assert refused(saved, spec, InvalidDelta).field == (field or ANY)


def test_infinite_alpha_is_refused(saved: Path, spec: BackboneSpec) -> None:
    text = (saved / CONFIG).read_text()
    for literal in ("1e999", "Infinity", "NaN"):
        (saved / CONFIG).write_text(text.replace('"lora_alpha": 4', f'"lora_alpha": {literal}'))
        assert refused(saved, spec, InvalidDelta).field in ("lora_alpha", CONFIG)


def test_a_scale_that_overflows_is_refused_when_lowered(saved: Path, spec: BackboneSpec) -> None:
    change_config(saved, lora_alpha=1e300)
    delta = read(files_in(saved), spec)
    with pytest.raises(InvalidDelta, match="overflows") as caught:
        lower(delta, spec)
    assert caught.value.field == "layers.0.attn.q"


def test_bad_tensors_are_refused_by_name(saved: Path, spec: BackboneSpec) -> None:
    original = load_file(saved / WEIGHTS)
    a, b = key_of(0, "A"), key_of(0, "B")
    cases: dict[str, tuple[dict[str, Tensor | None], type[DeltaError], str]] = {
        "missing partner": ({b: None}, InvalidDelta, b),
        "wrong input width": ({a: torch.zeros(2, 31)}, InvalidDelta, a),
        "wrong output width": ({b: torch.zeros(41, 2)}, InvalidDelta, b),
        "swapped": ({b: torch.zeros(2, 40)}, InvalidDelta, b),
        "wrong rank": ({a: torch.zeros(3, 32)}, InvalidDelta, "r"),
        "one dimension": ({a: torch.zeros(2)}, InvalidDelta, a),
        "empty": ({a: torch.zeros(0, 32)}, InvalidDelta, "r"),
        "nan": ({b: torch.full((40, 2), torch.nan)}, InvalidDelta, b),
        "infinity": ({b: torch.full((40, 2), -torch.inf)}, InvalidDelta, b),
        "integers": ({b: torch.zeros(40, 2, dtype=torch.int64)}, UnsupportedDelta, b),
        "bias": ({"base_model.model.model.norm.weight": torch.ones(32)}, InvalidDelta, ""),
        "no such layer": ({key_of(2, "A"): torch.zeros(2, 32)}, InvalidDelta, key_of(2, "A")),
        "another name": ({a.replace(".weight", ".default.weight"): original[a]}, InvalidDelta, ""),
        "a norm": ({key_of(0, "A", "input_layernorm"): torch.zeros(2, 32)}, InvalidDelta, ""),
        "head": (
            {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)},
            InvalidDelta,
            "base_model.model.lm_head.lora_B.weight",
        ),
        "embedding": (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 64)},
            InvalidDelta,
            "base_model.model.model.embed_tokens.lora_embedding_B",
        ),
    }
    for name, (changes, kind, field) in cases.items():
        save_file(original, saved / WEIGHTS)
        change_tensors(saved, **changes)
        error = refused(saved, spec, kind)
        assert error.field == (field or next(iter(changes))), name
    save_file({}, saved / WEIGHTS)
    assert refused(saved, spec, InvalidDelta).field == WEIGHTS


def test_unknown_tensors_are_listed_up_to_twenty(saved: Path, spec: BackboneSpec) -> None:
    change_tensors(saved, **{f"extra.{i:02}": torch.zeros(1) for i in range(25)})
    message = str(refused(saved, spec, InvalidDelta))
    assert "25 tensors" in message
    assert "'extra.00'" in message
    assert "'extra.19'" in message
    assert "'extra.20'" not in message
    assert "5 more" in message


def test_one_file_of_weights(saved: Path, spec: BackboneSpec) -> None:
    paths = {CONFIG: saved / CONFIG, WEIGHTS: saved / WEIGHTS, "adapter_model.bin": saved / "is-not-there"}
    with pytest.raises(InvalidDelta, match="not both") as caught:
        read(DeltaFiles(paths), spec)
    assert caught.value.field == "adapter_model.bin"


def test_hostile_patterns_take_no_time(saved: Path, spec: BackboneSpec) -> None:
    hostile = [
        {f"{'.*' * 2}{i:02}": 2 for i in range(16)},
        {f"q_proj{i}": 2 for i in range(4096)},
        {"(a+)+$": 2},
        {f"{'(q|q)' * 50}": 2},
        {"(.*a){20}": 2},
    ]
    for patterns in hostile:
        change_config(saved, rank_pattern=patterns)
        started = time.perf_counter()
        try:
            read(files_in(saved), spec)
        except UnsupportedDelta as error:
            assert error.field == "rank_pattern"  # noqa: PT017
        assert time.perf_counter() - started < 20


def test_a_pattern_dot_stands_for_any_character_as_in_peft(saved: Path, spec: BackboneSpec) -> None:
    def scales() -> dict[str, Any]:
        config: Delta = read(files_in(saved), spec)
        return dict(config.components[0].config)

    for pattern, matches in {
        "q.proj": True,
        "self_attn.q_proj": True,
        "q_proj": True,
        "proj": False,
        "model.layers.0.self_attn.q_proj": True,
        r"layers\.[0-9]+\.self_attn\.q_proj": True,
        "^layers.0.self_attn.q_proj": False,
        "^model.layers.0.self_attn.q_proj$": True,
    }.items():
        change_config(saved, alpha_pattern={pattern: 10})
        changed = scales().get("scales", {})
        assert (changed.get("layers.0.attn.q") == 5.0) == matches, pattern


# --- prompt tuning ---------------------------------------------------------------------------------------


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", token_dim=32).to_dict()
    config |= {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "prompt_tuning_init": "RANDOM"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.ones(4, 32)}, tmp_path / WEIGHTS)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"num_virtual_tokens": 5}, InvalidDelta, "num_virtual_tokens"),
        ({"num_virtual_tokens": 10**12}, InvalidDelta, "num_virtual_tokens"),
        ({"num_virtual_tokens": 4.0}, InvalidDelta, "num_virtual_tokens"),
        ({"token_dim": 64}, InvalidDelta, "token_dim"),
        ({"num_transformer_submodules": 2}, UnsupportedDelta, "num_transformer_submodules"),
        ({"task_type": "SEQ_CLS"}, UnsupportedDelta, "task_type"),
        ({"task_type": None}, UnsupportedDelta, "task_type"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedDelta, "modules_to_save"),
        ({"surprise": 0}, UnsupportedDelta, "surprise"),
    ],
)
def test_prompt_configs_that_do_not_fit(
    prompt: Path, spec: BackboneSpec, changes: dict[str, Any], kind: type[DeltaError], field: str
) -> None:
    change_config(prompt, **changes)
    assert refused(prompt, spec, kind).field == field


def test_prompt_tensors_that_do_not_fit(prompt: Path, spec: BackboneSpec) -> None:
    for tensor in (torch.ones(4, 31), torch.ones(4 * 32), torch.full((4, 32), torch.nan)):
        save_file({"prompt_embeddings": tensor}, prompt / WEIGHTS)
        assert refused(prompt, spec, InvalidDelta).field in ("prompt_embeddings", "num_virtual_tokens")
    change_config(prompt, num_virtual_tokens=64)
    save_file({"prompt_embeddings": torch.ones(64, 32)}, prompt / WEIGHTS)
    assert "no room" in str(refused(prompt, spec, InvalidDelta))
