"""PEFT's types that rotate or scale activations, replace norms, or put tokens before a row. See ``peft_table``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import (
    BeftConfig,
    BOFTConfig,
    CartridgeConfig,
    CPTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RoadConfig,
)

from tests.oracle.peft_reference import PROMPT_SIZES, Case, Family, Values

Make = Callable[[Family], PeftConfig]

_NO_CONV1D = {"gpt2": "PEFT has this type for torch.nn.Linear only; GPT-2's linears are Conv1D"}
_NOT_CAUSAL = dict.fromkeys(
    ("bert", "roberta", "distilbert", "modernbert", "bart", "t5"),
    "PEFT has this type for causal language models only",
)
_NO_CACHE = dict.fromkeys(
    ("distilbert", "modernbert"), "PEFT hands prefixes over in a cache, which the model does not take"
)
_ROTATION: dict[str, Values] = {"oft_": (0.0, 0.15)}


def _on(config: type[PeftConfig], **options: Any) -> Make:
    def make(family: Family) -> PeftConfig:
        return config(
            **{"task_type": family.task, "target_modules": list(family.linears)} | options  # type: ignore[arg-type]
        )

    return make


def _prompt(config: type[PeftConfig], **options: Any) -> Make:
    """Prompts know no masked language models; a feature extractor is run in the same way, and gives the same output."""

    def make(family: Family) -> PeftConfig:
        task = family.task or "FEATURE_EXTRACTION"
        settings = {"task_type": task, "num_virtual_tokens": 4, **PROMPT_SIZES.get(family.name, {})} | options
        return config(**settings)  # type: ignore[arg-type]

    return make


OTHER_CASES: tuple[Case, ...] = (
    Case("oft", "OFT", _on(OFTConfig, oft_block_size=8), _ROTATION, _NO_CONV1D),
    Case("oft_blocks", "OFT", _on(OFTConfig, r=4, oft_block_size=0), _ROTATION, _NO_CONV1D),
    Case("oft_adjusted", "OFT", _on(OFTConfig, oft_block_size=5), _ROTATION, _NO_CONV1D),
    Case(
        "oft_terms",
        "OFT",
        _on(OFTConfig, oft_block_size=8, num_cayley_neumann_terms=7),
        _ROTATION,
        _NO_CONV1D,
    ),
    Case("oft_cayley", "OFT", _on(OFTConfig, oft_block_size=8, use_cayley_neumann=False), {}, _NO_CONV1D),
    Case("oft_shared", "OFT", _on(OFTConfig, oft_block_size=8, block_share=True), _ROTATION, _NO_CONV1D),
    Case(
        "oft_constrained",
        "OFT",
        _on(OFTConfig, oft_block_size=8, coft=True, eps=2.0, use_cayley_neumann=False),
        {},
        _NO_CONV1D,
    ),
    Case(
        "oft_embedding",
        "OFT",
        lambda f: OFTConfig(task_type=f.task, oft_block_size=8, target_modules=[f.embedding]),
        _ROTATION,
    ),
    Case("boft", "BOFT", _on(BOFTConfig, boft_block_size=4), {}, _NO_CONV1D),
    Case("boft_blocks", "BOFT", _on(BOFTConfig, boft_block_size=0, boft_block_num=2), {}, _NO_CONV1D),
    Case("hra", "HRA", _on(HRAConfig, r=4), {}, _NO_CONV1D),
    Case("hra_gram_schmidt", "HRA", _on(HRAConfig, r=3, apply_GS=True), {}, _NO_CONV1D),
    Case(
        "road_1", "ROAD", _on(RoadConfig, variant="road_1", group_size=16), {"theta": (0.0, 0.5)}, _NO_CONV1D
    ),
    Case(
        "road_2", "ROAD", _on(RoadConfig, variant="road_2", group_size=8), {"theta": (0.0, 0.5)}, _NO_CONV1D
    ),
    Case(
        "road_4", "ROAD", _on(RoadConfig, variant="road_4", group_size=16), {"theta": (0.0, 0.5)}, _NO_CONV1D
    ),
    Case(
        "ia3",
        "IA3",
        lambda f: IA3Config(
            task_type=f.task,
            target_modules=[*f.linears],
            feedforward_modules=list(f.feedforward),
            fan_in_fan_out=f.conv1d,
        ),
    ),
    Case("ia3_outputs", "IA3", _on(IA3Config, feedforward_modules=[])),
    Case(
        "ln_tuning",
        "LN_TUNING",
        lambda f: LNTuningConfig(task_type=f.task, target_modules=[*f.norms, f.last_norm]),
    ),
    Case(
        "ln_tuning_linear",
        "LN_TUNING",
        lambda f: LNTuningConfig(task_type=f.task, target_modules=[f.linears[0], f.last_norm]),
    ),
    Case("beft", "BEFT", _on(BeftConfig), {}, _NO_CONV1D),
    Case("prompt", "PROMPT_TUNING", _prompt(PromptTuningConfig)),
    Case("prompt_bin", "PROMPT_TUNING", _prompt(PromptTuningConfig), pickled=True),
    Case("p_tuning_mlp", "P_TUNING", _prompt(PromptEncoderConfig, encoder_hidden_size=16)),
    Case(
        "p_tuning_lstm",
        "P_TUNING",
        _prompt(PromptEncoderConfig, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
        {"lstm": (0.0, 0.5)},
    ),
    Case(
        "cpt",
        "CPT",
        _prompt(
            CPTConfig,
            cpt_token_ids=[3, 4, 5, 6],
            cpt_mask=[1, 1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 3, 4],
            opt_projection_epsilon=30.0,
            opt_projection_format_epsilon=20.0,
        ),
        excluded=_NOT_CAUSAL,
    ),
    Case(
        "prefix",
        "PREFIX_TUNING",
        _prompt(PrefixTuningConfig),
        {"prompt_encoder": (0.0, 1.0)},
        _NO_CACHE,
    ),
    Case(
        "prefix_projected",
        "PREFIX_TUNING",
        _prompt(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=16),
        {"prompt_encoder": (0.0, 0.6)},
        _NO_CACHE,
    ),
    Case(
        "cartridge",
        "CARTRIDGE",
        _prompt(CartridgeConfig, num_frozen_tokens=1),
        {"prompt_encoder": (0.0, 1.0)},
        _NO_CACHE,
    ),
)
