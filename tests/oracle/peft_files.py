"""LoRAs and soft prompts as PEFT saves them, every weight random, for any causal backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, TaskType, get_peft_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(rank: int, alpha: int, targets: list[str] | None = None, **options: object) -> LoraConfig:
    """On all linears unless ``targets`` says otherwise."""
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets or LINEARS, task_type=TaskType.CAUSAL_LM, **options
    )


def prompt(tokens: int) -> PromptTuningConfig:
    return PromptTuningConfig(num_virtual_tokens=tokens, task_type=TaskType.CAUSAL_LM)


def save(
    root: Path, stock: Callable[[], torch.nn.Module], configs: Mapping[str, PeftConfig], *, std: float
) -> dict[str, Path]:
    """One folder per config. ``std`` sizes the random weights (a prompt's are ``std`` too)."""
    made: dict[str, Path] = {}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = get_peft_model(stock(), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key or "prompt" in key:
                torch.nn.init.normal_(parameter, std=std)
        made[name] = root / name
        model.save_pretrained(made[name])
    return made
