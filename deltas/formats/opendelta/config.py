"""Every key of OpenDelta's configs: what changes nothing here (None), and what a value must be to be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.header import shown
from deltas.formats.plan import Check, check_config, one_of
from deltas.methods.base import number

CONFIG = "config.json"
MAX_SIZE = 1 << 20  # of any width, rank or length a config states

_COMMON: Mapping[str, Check | None] = {
    "delta_type": None,
    "modified_modules": None,
    "exclude_modules": None,
    "common_structure": None,
    # What was trained beside the delta: the file's keys say it.
    "unfrozen_modules": None,
    # Of the backbone as it was, the delta's own parameters included: nothing to compare them with.
    "backbone_class": None,
    "backbone_checkpoint_name": None,
    "backbone_hash": None,
    "opendelta_version": None,
    "transformers_version": None,
}


def _size(key: str, value: object) -> None:
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise InvalidDelta(f"{key} must be a whole number from 1 to {MAX_SIZE}", field=key)


def _activation(key: str, value: object) -> None:
    if not isinstance(value, str) or value.lower() not in ACTIVATIONS:
        raise UnsupportedDelta(f"{key} is {shown(value)}; served: {', '.join(ACTIVATIONS)}", field=key)


def _number(key: str, value: object) -> None:
    number(value, key)


_flag = one_of(True, False)

ACTIVATIONS = {
    "relu": "relu",
    "tanh": "tanh",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_orig": "gelu",
    "gelu": "gelu",
    "leakyrelu": "leaky_relu",
}
"""OpenDelta's names -> ours."""

KEYS: Mapping[str, Mapping[str, Check | None]] = {
    "lora": {"lora_r": _size, "lora_alpha": _number, "lora_dropout": None},
    "adapter": {"bottleneck_dim": _size, "non_linearity": _activation},
    # The library drops ``scaled`` when it loads: it has no effect there.
    "parallel_adapter": {"bottleneck_dim": _size, "non_linearity": _activation, "scaled": None},
    "compacter": {
        "reduction_factor": _size,
        "non_linearity": _activation,
        "hypercomplex_division": _size,
        "phm_rank": _size,
        "factorized_phm": _flag,
        "factorized_phm_rule": _flag,
        "use_bias_up_sampler": _flag,
        "use_bias_down_sampler": _flag,
        "learn_phm": one_of(True),  # else the rule is not in the file, and random after loading
        "shared_phm_rule": one_of(False),
        "shared_W_phm": one_of(False),
        "kronecker_prod": one_of(True, False, None),  # two ways to compute one product
        "phm_c_init": None,
        "phm_init_range": None,
        "hypercomplex_nonlinearity": None,  # an initialisation, whatever its name says
        "bottleneck_dim": None,  # not read by the library
        "sequential": None,  # not read by the library
    },
    "low_rank_adapter": {
        "reduction_factor": _size,
        "non_linearity": _activation,
        "low_rank_rank": one_of(1),  # the library multiplies the factors elementwise: others fail there
        "low_rank_w_init": None,
    },
    "bitfit": {},
    "soft_prompt": {"soft_token_num": _size, "init_range": None, "token_init": None},
    "prefix": {
        "prefix_token_num": _size,
        "reparameterize": _flag,
        "embed_dim": _size,
        "mid_dim": _size,
    },
}
"""Delta type -> its own keys."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"lora_r": 8, "lora_alpha": 16},
    "adapter": {"bottleneck_dim": 24, "non_linearity": "gelu_new"},
    "parallel_adapter": {"bottleneck_dim": 24, "non_linearity": "gelu_new"},
    "compacter": {
        "reduction_factor": 16,
        "non_linearity": "relu",
        "hypercomplex_division": 4,
        "phm_rank": 1,
        "factorized_phm": True,
        "factorized_phm_rule": False,
        "use_bias_up_sampler": True,
        "use_bias_down_sampler": True,
    },
    "low_rank_adapter": {"reduction_factor": 32, "non_linearity": "gelu_new"},
    "bitfit": {},
    "soft_prompt": {"soft_token_num": 100},
    "prefix": {"prefix_token_num": 6, "reparameterize": True, "embed_dim": 512, "mid_dim": 512},
}
"""What the library's config classes take for a key that is not in the file."""


def checked(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The delta type, and its own keys with the library's defaults for those that are missing.

    Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the key.
    """
    kind = config.get("delta_type")
    if not isinstance(kind, str) or kind not in KEYS:
        raise UnsupportedDelta(
            f"OpenDelta's {shown(kind)} is not served; served: {', '.join(KEYS)}", field="delta_type"
        )
    check_config(config, {**_COMMON, **KEYS[kind]}, CONFIG)
    return kind, {**DEFAULTS[kind], **{key: config[key] for key in KEYS[kind] if key in config}}
