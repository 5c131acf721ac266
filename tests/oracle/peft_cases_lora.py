"""PEFT's LORA type: every option that changes its mathematics, in evaluation. See ``peft_table``."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
)
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig

from tests.oracle.peft_reference import FAMILIES, Case, Family

_TOKENS = [3, 9, 17, 60]


def _lora(family: Family, **options: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "task_type": family.task,
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(family.linears),
        "fan_in_fan_out": family.conv1d,
    }
    return LoraConfig(**(settings | options))


def _rank_patterns(family: Family) -> LoraConfig:
    first, second = family.linears[0], family.linears[1]
    names = {"t5": "block", "gpt2": "h"} | dict.fromkeys(("bart", "llama", "modernbert"), "layers")
    layer = names.get(family.name, "layer")
    return _lora(
        family,
        rank_pattern={first: 8, rf"{layer}\.1\..*{second}": 2},
        alpha_pattern={second: 3, rf"^.*{layer}\.0\..*{first}": 20},
    )


def _regex(family: Family) -> LoraConfig:
    names = "|".join(name.replace(".", r"\.") for name in family.query_value)
    return _lora(family, target_modules=rf".*\.1\..*({names})$")


def _adalora(family: Family, **options: Any) -> AdaLoraConfig:
    settings: dict[str, Any] = {
        "task_type": family.task,
        "init_r": 6,
        "target_r": 3,
        "lora_alpha": 8,
        "total_step": 100,
        "target_modules": list(family.linears),
    }
    return AdaLoraConfig(**(settings | options))


def _cut_ranks(model: PeftModel, _family: Family) -> None:
    """What training leaves: a mask of the ranks that stay, by which PEFT cuts the tensors when it saves."""
    names = sorted(name for name, _ in model.base_model.model.named_parameters() if ".lora_E." in name)
    model.peft_config["default"].rank_pattern = {
        name.removesuffix(".default"): [bool((index + 3 * rank) % 4) for rank in range(6)]
        for index, name in enumerate(names)
    }


LORA_CASES: tuple[Case, ...] = (
    Case("lora", "LORA", _lora),
    Case("lora_bin", "LORA", _lora, pickled=True),
    Case("lora_bf16", "LORA", _lora, dtype=torch.bfloat16),
    Case("lora_rslora", "LORA", lambda f: _lora(f, use_rslora=True)),
    Case("lora_patterns", "LORA", _rank_patterns),
    Case("lora_regex", "LORA", _regex),
    Case("lora_all_linear", "LORA", lambda f: _lora(f, target_modules="all-linear")),
    Case(
        "lora_one_layer",
        "LORA",
        lambda f: _lora(f, target_modules=list(f.query_value), layers_to_transform=[1]),
    ),
    Case("lora_dora", "LORA", lambda f: _lora(f, use_dora=True)),
    Case(
        "lora_dora_rslora",
        "LORA",
        lambda f: _lora(f, use_dora=True, use_rslora=True, lora_alpha=5),
        {r"lora_[AB]": (0.0, 0.1), "magnitude": (1.0, 0.2)},
    ),
    Case(
        "lora_bias_all",
        "LORA",
        lambda f: _lora(f, bias="all", target_modules=list(f.query_value)),
    ),
    Case(
        "lora_bias_only",
        "LORA",
        lambda f: _lora(f, bias="lora_only"),
    ),
    Case("lora_lora_bias", "LORA", lambda f: _lora(f, lora_bias=True)),
    Case(
        "lora_embedding",
        "LORA",
        lambda f: _lora(f, target_modules=[*f.query_value, f.embedding], fan_in_fan_out=False),
    ),
    Case(
        "lora_dora_embedding",
        "LORA",
        lambda f: _lora(f, target_modules=[*f.query_value, f.embedding], use_dora=True, fan_in_fan_out=False),
    ),
    Case("lora_head", "LORA", lambda f: _lora(f, target_modules=[*f.query_value, f.head])),
    Case("lora_dora_head", "LORA", lambda f: _lora(f, target_modules=[f.head], use_dora=True)),
    Case(
        "lora_save_embedding_and_head",
        "LORA",
        lambda f: _lora(f, target_modules=list(f.query_value), modules_to_save=[f.embedding, f.head]),
    ),
    Case(
        "lora_save_norms",
        "LORA",
        lambda f: _lora(f, target_modules=list(f.query_value), modules_to_save=[f.last_norm, *f.norms[:1]]),
    ),
    Case(
        "lora_save_linear",
        "LORA",
        lambda f: _lora(f, target_modules=list(f.query_value), modules_to_save=list(f.linears[-1:])),
    ),
    Case(
        "lora_tokens",
        "LORA",
        lambda f: _lora(f, target_modules=list(f.query_value), trainable_token_indices=_TOKENS),
    ),
    Case("lora_pissa", "LORA", lambda f: _lora(f, init_lora_weights="pissa")),
    Case(
        "lora_olora",
        "LORA",
        lambda f: _lora(f, init_lora_weights="olora"),
        excluded={"gpt2": "PEFT decomposes the weight without regard to Conv1D's transposition and fails"},
    ),
    Case("lora_orthogonal", "LORA", lambda f: _lora(f, init_lora_weights="orthogonal")),
    Case("lora_mica", "LORA", lambda f: _lora(f, init_lora_weights="mica")),
    Case(
        "lora_monteclora",
        "LORA",
        lambda f: _lora(f, monteclora_config=MontecloraConfig(), target_modules=list(f.query_value)),
    ),
    Case(
        "lora_velora",
        "LORA",
        lambda f: _lora(f, velora_config=VeloraConfig(num_groups=4), target_modules=list(f.query_value)),
    ),
    Case(
        "lora_bdlora",
        "LORA",
        lambda f: _lora(
            f,
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=list(f.linears[:1]),
                target_modules_bd_b=list(f.linears[2:3]),
                nblocks=2,
                match_strict=False,
            ),
            target_modules=[f.linears[0], f.linears[1], f.linears[2]],
        ),
        excluded={"gpt2": "PEFT asks Conv1D for in_features, which it has not"},
    ),
    Case("adalora", "ADALORA", _adalora, values={"lora_E": (0.0, 1.0)}),
    Case("adalora_cut", "ADALORA", _adalora, values={"lora_E": (0.0, 1.0)}, prepare=_cut_ranks),
    Case("adalora_no_alpha", "ADALORA", lambda f: _adalora(f, lora_alpha=0), prepare=_cut_ranks),
    Case(
        "trainable_tokens",
        "TRAINABLE_TOKENS",
        lambda f: TrainableTokensConfig(
            task_type=f.task, token_indices=_TOKENS, target_modules=[f.embedding]
        ),
    ),
    Case(
        "trainable_tokens_default",
        "TRAINABLE_TOKENS",
        lambda f: TrainableTokensConfig(task_type=f.task, token_indices=_TOKENS),
    ),
)

__all__ = ["FAMILIES", "LORA_CASES"]
