"""The configs' keys. Every key of every PEFT config class has an entry: None for what changes nothing, else a check."""

from __future__ import annotations

from collections.abc import Mapping

from deltas.errors import UnsupportedDelta
from deltas.formats.files import listed
from deltas.formats.plan import Check, absent, one_of

Keys = Mapping[str, Check | None]

TASKS = ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
"""Tasks whose models have no language model's head."""

# Read by ``plan`` for its head, or informational.
COMMON: Keys = {
    "peft_type": None,
    "task_type": one_of("CAUSAL_LM", "SEQ_2_SEQ_LM", *TASKS, None),
    "auto_mapping": None,
    "peft_version": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": None,
}

# Where a type applies: its tensors say it, and ``target_modules`` is compared with them.
_WHERE: Keys = {
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}

# How the backbone stores its weights (which we know), and initial values.
_TRAINING: Keys = {"fan_in_fan_out": None, "init_weights": None}


def tuner(*ignored: str, **checks: Check | None) -> Keys:
    """A tuner type's keys: the common ones, ``ignored`` ones and ``checks``; ``modules_to_save`` is read by ``saved``."""
    own: dict[str, Check | None] = dict.fromkeys(ignored)
    return {**COMMON, **_WHERE, **_TRAINING, "modules_to_save": None, **own, **checks}


def prompts(*ignored: str, **checks: Check | None) -> Keys:
    """A prompt type's keys. ``num_virtual_tokens``, ``token_dim`` and the submodules are read by ``prompts``."""
    own: dict[str, Check | None] = dict.fromkeys(ignored)
    sizes = (
        "num_virtual_tokens",
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
    )
    return {**COMMON, **dict.fromkeys(sizes), "modules_to_save": None, **own, **checks}


def biases(key: str, value: object) -> None:
    """``bias``: none, all of the model's, or those of the wrapped modules, which each type calls otherwise."""
    if value not in ("none", "all") and not (isinstance(value, str) and value.endswith("_only")):
        raise UnsupportedDelta(
            f"{key} is {listed([str(value)])}; served: none, all and <type>_only", field=key
        )


LORA_TRAINING: Keys = {
    "lora_dropout": None,
    "ensure_weight_tying": None,  # the file repeats what it ties
    "runtime_config": None,
    "eva_config": None,
    "loftq_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "monteclora_config": None,  # perturbs the factors in training only
    "velora_config": None,  # compresses activations in training only
    "megatron_core": None,
    "qalora_group_size": None,
}
"""What in a LoRA config concerns training alone."""

LORA_REFUSED: Keys = {
    "use_qalora": absent,
    "alora_invocation_tokens": absent,
    "target_parameters": absent,
    "layer_replication": absent,
    "megatron_config": absent,
    "arrow_config": absent,
    "kasa_config": absent,
}
"""Other mathematics, not served."""
