"""PEFT's own files, read and lowered, give PEFT's own output; what cannot be served is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from deltas.errors import InvalidDelta
from deltas.formats import DeltaFiles, read
from deltas.formats import peft as reader
from deltas.formats.peft.keys import tuner
from deltas.methods import lower, rank
from deltas.patches import LowRank, SoftPrompt
from deltas.sites import BackboneSpec

IDS = torch.arange(1, 12) * 5 % 64
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def files_in(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


def make(model: LlamaForCausalLM, config: peft.PeftConfig, folder: Path) -> Tensor:
    """Tune nothing, but give every tensor noise; save; return PEFT's logits ``[length, vocab]``."""
    tuned = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "prompt" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        tuned.save_pretrained(folder)
        logits: Tensor = tuned(input_ids=IDS[None]).logits[0, -len(IDS) :]
    return logits


LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {"r": 2, "target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj", "gate_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj", "up_proj"],
        "rank_pattern": {"layers.1.mlp.down_proj": 3, r"^model\.layers\.\d+\.mlp\.up_proj$": 6},
        "alpha_pattern": {"q_proj": 2, "down_proj": 5},
    },
    "rslora-patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["k_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
    },
    "some-layers": {
        "r": 3,
        "target_modules": ["k_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "mica"},
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", LORAS)
def test_lora_gives_pefts_output(
    name: str, llama: LlamaForCausalLM, spec: BackboneSpec, tmp_path: Path, apply: Callable[..., Tensor]
) -> None:
    with torch.no_grad():
        base = llama(input_ids=IDS[None]).logits[0]
    expected = make(llama, peft.LoraConfig(task_type="CAUSAL_LM", **LORAS[name]), tmp_path)
    delta = read(files_in(tmp_path), spec)
    assert (delta.methods, delta.format) == (["lora"], "peft")
    assert rank(delta) == max([LORAS[name]["r"], *LORAS[name].get("rank_pattern", {}).values()])
    assert sum(1 for _ in delta.named_tensors()) == len(load_file(tmp_path / WEIGHTS))

    # PEFT changed the model in place; the original layers are inside its wrappers.
    clean = LlamaForCausalLM(llama.config).eval()
    torch.manual_seed(0)
    clean.load_state_dict(
        {
            key.replace(".base_layer", ""): value
            for key, value in llama.state_dict().items()
            if "lora_" not in key
        }
    )
    got = apply(clean, spec, lower(delta, spec), IDS)
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quiet")
def test_one_linear_by_hand(llama: LlamaForCausalLM, spec: BackboneSpec, tmp_path: Path) -> None:
    make(
        llama, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path
    )
    patch = lower(read(files_in(tmp_path), spec), spec)[0]
    assert isinstance(patch, LowRank)
    assert patch.site == "layers.0.attn.q"
    layer = llama.get_submodule(spec.sites[patch.site].path)
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer.base_layer(x) + (x @ patch.down.T) @ patch.up, layer(x))


@pytest.mark.usefixtures("quiet")
def test_prompt_tuning_gives_pefts_output(
    llama: LlamaForCausalLM, spec: BackboneSpec, tmp_path: Path, apply: Callable[..., Tensor]
) -> None:
    expected = make(llama, peft.PromptTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"), tmp_path)
    delta = read(files_in(tmp_path), spec)
    (patch,) = lower(delta, spec)
    assert isinstance(patch, SoftPrompt)
    assert patch.embeddings.shape == (6, 32)
    assert rank(delta) is None
    torch.testing.assert_close(apply(llama, spec, [patch], IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_keep_their_dtype_and_lower_in_float32(
    saved: Path, spec: BackboneSpec, dtype: torch.dtype
) -> None:
    save_file({k: v.to(dtype) for k, v in load_file(saved / WEIGHTS).items()}, saved / WEIGHTS)
    delta = read(files_in(saved), spec)
    assert {tensor.dtype for _, tensor in delta.named_tensors()} == {dtype}
    for patch in lower(delta, spec):
        assert isinstance(patch, LowRank)
        assert patch.up.dtype == patch.down.dtype == torch.float32
        assert patch.up.is_contiguous()
        assert patch.down.is_contiguous()


def test_float64_only_where_it_is_exact(saved: Path, spec: BackboneSpec) -> None:
    tensors = load_file(saved / WEIGHTS)
    before = read(files_in(saved), spec)
    save_file({k: v.double() for k, v in tensors.items()}, saved / WEIGHTS)
    assert read(files_in(saved), spec).digest == before.digest
    key = min(tensors)
    save_file({k: v.double() + (1e-12 if k == key else 0) for k, v in tensors.items()}, saved / WEIGHTS)
    with pytest.raises(InvalidDelta, match="float64") as caught:
        read(files_in(saved), spec)
    assert caught.value.field == key


# --- every key of the library is known -------------------------------------------------------------------


@pytest.mark.parametrize("kind", reader.TYPES)
def test_every_key_of_the_library_is_in_the_table(kind: str) -> None:
    library = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    fields, known = {field.name for field in dataclasses.fields(library)}, set(reader.TYPES[kind].keys)
    assert not fields - known
    assert known - fields <= set(tuner())  # what most types have
