"""The twelve deltas on SmolLM2 that several tests serve: three of each kind, and each kind's source to compare with.

LoRAs and prompts are saved by PEFT and bottlenecks are in AdapterHub's layout, a folder each; BitFit is native.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from deltas.delta import Component, Delta
from deltas.sites import BackboneSpec
from tests.oracle import peft_files, reference
from tests.oracle.make_deltas import random_shifts, write_bottleneck

LORAS = {
    "lora4": peft_files.lora(4, 8, ["q_proj", "v_proj"]),
    "lora8": peft_files.lora(8, 16),
    "lora32": peft_files.lora(32, 32, ["k_proj", "o_proj", "down_proj"], use_rslora=True),
}
PROMPTS = {
    "prompt4": peft_files.prompt(4),
    "prompt16": peft_files.prompt(16),
    "prompt30": peft_files.prompt(30),
}
BOTTLENECKS = {"seq_bn": 16, "double_seq_bn": 12, "par_bn": 24}
BITFITS = {"bitfit1": 1, "bitfit2": 2, "bitfit3": 3}
NAMES = [*LORAS, *PROMPTS, *BOTTLENECKS, *BITFITS]


def write_folders(smollm2: Path, root: Path) -> dict[str, Path]:
    """What users would upload: folders as the libraries save them, for all but BitFit."""

    def stock() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    made = peft_files.save(root, stock, LORAS, std=0.04) | peft_files.save(root, stock, PROMPTS, std=0.15)
    config = AutoConfig.from_pretrained(smollm2)
    for seed, (kind, factor) in enumerate(BOTTLENECKS.items()):
        made[kind] = root / kind
        made[kind].mkdir()
        write_bottleneck(made[kind], config, kind, name=kind, reduction_factor=factor, seed=seed, scale=0.5)  # type: ignore[arg-type]
    return made


def bitfit_delta(smollm2: Path, spec: BackboneSpec, name: str) -> Delta:
    """The native form of a BitFit."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return native_bitfit(_shifts(model, name), spec)


def native_bitfit(shifts: Mapping[str, Tensor], spec: BackboneSpec) -> Delta:
    """A BitFit given by module path, in the native form."""
    tensors = {f"{spec.by_path[path].name}/beta": beta for path, beta in shifts.items()}
    return Delta((Component("bitfit", {}, tensors),))


@contextmanager
def source(
    smollm2: Path, folders: dict[str, Path], name: str, dtype: torch.dtype
) -> Iterator[torch.nn.Module]:
    """The delta's own library (or the reference) with that delta on; the backbone alone for any other name."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype, attn_implementation="eager").eval()
    if name in LORAS or name in PROMPTS:
        yield PeftModel.from_pretrained(model, folders[name]).eval()
    elif name in BITFITS:
        with reference.bitfit(model, _shifts(model, name)):
            yield model
    else:
        with reference.bottleneck(model, folders[name]) if name in BOTTLENECKS else nullcontext():
            yield model


@torch.no_grad()
def teacher_forced(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> Tensor:
    """The source's float32 logits ``[steps, vocab]`` for each token, in one unpadded pass without a cache."""
    ids = torch.tensor([prompt + tokens[:-1]])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[-len(tokens) :].float()


def _shifts(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    return random_shifts(model, seed=BITFITS[name], scale=0.3)
