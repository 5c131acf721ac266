"""PEFT's types that change a linear's weight: low rank, dense, sparse, or derived from the weight. See ``peft_table``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import (
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeanutConfig,
    PeftConfig,
    PveraConfig,
    RandLoraConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)

from tests.oracle.peft_reference import Case, Family, Values

Make = Callable[[Family], PeftConfig]

_NO_CONV1D = {"gpt2": "PEFT has this type for torch.nn.Linear only; GPT-2's linears are Conv1D"}
_WIDE: Values = (0.0, 1.0)


def _on(config: type[PeftConfig], **options: Any) -> Make:
    """A config that targets every linear of a layer, unless ``options`` say otherwise."""

    def make(family: Family) -> PeftConfig:
        return config(
            **{"task_type": family.task, "target_modules": list(family.linears)} | options  # type: ignore[arg-type]
        )

    return make


def _patterned(config: type[PeftConfig], **options: Any) -> Make:
    """The same with ``rank_pattern`` and, where the type has it, ``alpha_pattern``."""

    def make(family: Family) -> PeftConfig:
        first, second = family.linears[0], family.linears[1]
        return _on(config, **options, rank_pattern={first: 3, rf".*\.1\..*{second}": 1})(family)

    return make


WEIGHT_CASES: tuple[Case, ...] = (
    Case("vera", "VERA", _on(VeraConfig, r=8), {"lambda_d": _WIDE, "lambda_b": _WIDE}),
    Case(
        "vera_seed",
        "VERA",
        _on(VeraConfig, r=8, save_projection=False, projection_prng_key=7),
        {"lambda_d": _WIDE, "lambda_b": _WIDE},
    ),
    Case("pvera", "PVERA", _on(PveraConfig, r=8), {"lambda_d": _WIDE, "lambda_b": _WIDE}),
    Case("loha", "LOHA", _on(LoHaConfig, r=3, alpha=5), {"hada": (0.0, 0.4)}, _NO_CONV1D),
    Case("loha_patterns", "LOHA", _patterned(LoHaConfig, r=2, alpha=5), {"hada": (0.0, 0.5)}, _NO_CONV1D),
    Case("lokr_full", "LOKR", _on(LoKrConfig, r=8, alpha=8), {}, _NO_CONV1D),
    Case("lokr_low", "LOKR", _on(LoKrConfig, r=2, alpha=3), {"lokr": (0.0, 0.5)}, _NO_CONV1D),
    Case(
        "lokr_both",
        "LOKR",
        _on(LoKrConfig, r=1, alpha=2, decompose_both=True),
        {"lokr": (0.0, 0.7)},
        _NO_CONV1D,
    ),
    Case(
        "lokr_factor",
        "LOKR",
        _on(LoKrConfig, r=2, alpha=2, decompose_both=True, decompose_factor=8),
        {"lokr": (0.0, 0.7)},
        _NO_CONV1D,
    ),
    Case("lokr_patterns", "LOKR", _patterned(LoKrConfig, r=2, alpha=5), {"lokr": (0.0, 0.5)}, _NO_CONV1D),
    Case(
        "delora",
        "DELORA",
        _on(DeloraConfig, r=4),
        {"lambda": (4.0, 0.5)},
        _NO_CONV1D,
    ),
    Case("delora_patterns", "DELORA", _patterned(DeloraConfig, r=2), {"lambda": (4.0, 0.5)}, _NO_CONV1D),
    Case("miss", "MISS", _on(MissConfig, r=8), {}, _NO_CONV1D),
    Case("miss_remainder", "MISS", _on(MissConfig, r=5), {}, _NO_CONV1D),
    Case("miss_mini", "MISS", _on(MissConfig, r=8, mini_r=8, init_weights="mini"), {}, _NO_CONV1D),
    Case("miss_mini_remainder", "MISS", _on(MissConfig, r=7, mini_r=4, init_weights="mini"), {}, _NO_CONV1D),
    Case("miss_bat", "MISS", _on(MissConfig, r=8, init_weights="bat"), {}, _NO_CONV1D),
    Case("fourierft", "FOURIERFT", _on(FourierFTConfig, n_frequency=100, scaling=100.0)),
    Case(
        "fourierft_seed", "FOURIERFT", _on(FourierFTConfig, n_frequency=40, random_loc_seed=5, scaling=150.0)
    ),
    Case("shira", "SHIRA", _on(ShiraConfig, r=2), {"shira_weight": (0.0, 0.7)}, _NO_CONV1D),
    Case("shira_seed", "SHIRA", _on(ShiraConfig, r=1, random_seed=4), {"shira_weight": _WIDE}, _NO_CONV1D),
    Case("randlora", "RANDLORA", _on(RandLoraConfig, r=8, randlora_alpha=16), {"gamma": (0.0, 0.1)}),
    Case(
        "randlora_seed",
        "RANDLORA",
        _on(RandLoraConfig, r=8, randlora_alpha=16, save_projection=False, projection_prng_key=3),
        {"gamma": (0.0, 0.1)},
    ),
    Case(
        "randlora_sparse",
        "RANDLORA",
        _on(RandLoraConfig, r=5, randlora_alpha=10, sparse=True, save_projection=False),
        {"gamma": (0.0, 0.1)},
    ),
    Case(
        "randlora_very_sparse",
        "RANDLORA",
        _on(RandLoraConfig, r=5, randlora_alpha=10, very_sparse=True, save_projection=False),
        {"gamma": (0.0, 0.05)},
    ),
    Case("c3a", "C3A", _on(C3AConfig, block_size=16), {"c3a_kernel": (0.0, 3.0)}, _NO_CONV1D),
    Case("c3a_small_blocks", "C3A", _on(C3AConfig, block_size=8), {"c3a_kernel": (0.0, 3.0)}, _NO_CONV1D),
    Case("waveft", "WAVEFT", _on(WaveFTConfig, n_frequency=100, scaling=3.0)),
    Case("waveft_no_idwt", "WAVEFT", _on(WaveFTConfig, n_frequency=100, scaling=3.0, use_idwt=False)),
    Case("hira", "HIRA", _on(HiraConfig, r=4)),
    Case("hira_patterns", "HIRA", _patterned(HiraConfig, r=2)),
    Case(
        "hira_embedding",
        "HIRA",
        lambda f: HiraConfig(task_type=f.task, r=4, target_modules=[*f.query_value, f.embedding]),
    ),
    Case(
        "vblora",
        "VBLORA",
        _on(VBLoRAConfig, r=4, num_vectors=12, vector_length=8, topk=2),
        {"vector_bank": (0.0, 0.25)},
    ),
    Case(
        "vblora_topk",
        "VBLORA",
        _on(VBLoRAConfig, r=4, num_vectors=12, vector_length=8, topk=3, save_only_topk_weights=True),
        {"vector_bank": (0.0, 0.15)},
    ),
    Case("unilora", "UNILORA", _on(UniLoraConfig, r=4, theta_d_length=64), {"theta_d": (0.0, 4.0)}),
    Case(
        "unilora_indices",
        "UNILORA",
        _on(UniLoraConfig, r=4, theta_d_length=64, save_indices=True),
        {"theta_d": (0.0, 4.0)},
    ),
    Case("tinylora", "TINYLORA", _on(TinyLoraConfig, r=4, u=6), {"tinylora_v": (0.0, 0.5)}),
    Case(
        "tinylora_seed",
        "TINYLORA",
        _on(TinyLoraConfig, r=4, u=6, save_projection=False, weight_tying=0.5),
        {"tinylora_v": (0.0, 0.5)},
    ),
    Case("gralora", "GRALORA", _on(GraloraConfig, r=8, gralora_k=2, alpha=12)),
    Case("gralora_hybrid", "GRALORA", _on(GraloraConfig, r=4, gralora_k=4, hybrid_r=3, alpha=12)),
    Case("glora", "GLORA", _on(GloraConfig, r=3), {}, _NO_CONV1D),
    Case(
        "glora_vectors",
        "GLORA",
        _on(GloraConfig, r=3, config_A_B="vector", config_C="vector", config_D_E="constant"),
        {},
        _NO_CONV1D,
    ),
    Case(
        "glora_constants",
        "GLORA",
        _on(GloraConfig, r=3, config_A_B="constant", config_C="none", config_D_E="none"),
        {},
        _NO_CONV1D,
    ),
    Case("deft", "DEFT", _on(DeftConfig, r=4, alpha=6, decomposition_method="relu")),
    Case("deft_qr", "DEFT", _on(DeftConfig, r=4, decomposition_method="qr")),
    Case("deft_para", "DEFT", _on(DeftConfig, r=4, para=True)),
    Case("peanut", "PEANUT", _on(PeanutConfig, r=4, depth=2, scaling=0.5), {}, _NO_CONV1D),
    Case("peanut_shallow", "PEANUT", _on(PeanutConfig, r=4, depth=0, act_fn="tanh"), {}, _NO_CONV1D),
    Case("supertuning", "SUPERTUNING", _on(SupertuningConfig, sparsity=0.9), {}, _NO_CONV1D),
    Case("supertuning_low_rank", "SUPERTUNING", _on(SupertuningConfig, sparsity=0.95, r=3), {}, _NO_CONV1D),
    Case(
        "supertuning_recomputed",
        "SUPERTUNING",
        _on(SupertuningConfig, sparsity=0.95, save_precomputed_indices=False, select_top=False),
        {},
        _NO_CONV1D,
    ),
)
