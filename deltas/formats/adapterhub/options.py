"""What the keys of AdapterHub's configurations mean: a check where other mathematics would follow, else None."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.header import shown
from deltas.formats.plan import Check, absent, one_of
from deltas.methods.base import number

Config = Mapping[str, Any]

TOP_KEYS: Mapping[str, Check | None] = {
    "config": None,
    "hidden_size": None,
    "label2id": None,
    "model_class": None,
    "model_name": None,
    "model_type": None,
    "name": None,
    "type": None,
    "version": None,
}

_FLAG = one_of(True, False)

BOTTLENECK_KEYS: Mapping[str, Check | None] = {
    # Read in bottleneck.py.
    "mh_adapter": _FLAG,
    "output_adapter": _FLAG,
    "cross_adapter": _FLAG,
    "reduction_factor": None,
    "non_linearity": None,
    "scaling": None,
    "is_parallel": _FLAG,
    "original_ln_before": _FLAG,
    "original_ln_after": _FLAG,
    "residual_before_ln": one_of(True, False, "post_add"),
    "adapter_residual_before_ln": _FLAG,
    "ln_before": _FLAG,
    "ln_after": _FLAG,
    "use_gating": _FLAG,
    "leave_out": None,
    "inv_adapter": one_of("nice", "glow", None),
    "phm_layer": _FLAG,
    "phm_dim": None,
    "phm_bias": _FLAG,
    "factorized_phm_W": _FLAG,
    "factorized_phm_rule": _FLAG,
    "shared_W_phm": _FLAG,
    "shared_phm_rule": _FLAG,
    # Other mathematics.
    "architecture": absent,
    "invertible_adapter": absent,
    # The tensors say it, or it is used in training only.
    "inv_adapter_reduction_factor": None,
    "phm_rank": None,
    "phm_c_init": None,
    "phm_init_range": None,
    "learn_phm": None,
    "hypercomplex_nonlinearity": None,
    "init_weights": None,
    "init_weights_seed": None,
    "dropout": None,
    "stochastic_depth": None,
}
BOTTLENECK_DEFAULTS: Config = {
    "scaling": 1.0,
    "is_parallel": False,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "cross_adapter": False,
    "leave_out": [],
    "inv_adapter": None,
    "phm_layer": False,
    "phm_bias": True,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}

LORA_KEYS: Mapping[str, Check | None] = {
    "architecture": None,
    "selfattn_lora": _FLAG,
    "intermediate_lora": _FLAG,
    "output_lora": _FLAG,
    "leave_out": None,
    "r": None,
    "alpha": None,
    "attn_matrices": None,
    "composition_mode": one_of("add", "scale"),
    "use_gating": _FLAG,
    "use_dora": _FLAG,
    "vera_d": None,
    "vera_b": None,
    "n_up_projection": None,
    "weights_sharpness": None,
    "task_specific_matrix_type": one_of("singular_values"),
    # The tensors say it, or it is used in training only.
    "dtype": None,
    "dropout": None,
    "init_weights": None,
    "init_weights_seed": None,
}
LORA_DEFAULTS: Config = {
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 8,
    "alpha": 8,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "weights_sharpness": 0.05,
}

PREFIX_KEYS: Mapping[str, Check | None] = {
    "architecture": None,
    "encoder_prefix": _FLAG,
    "cross_prefix": _FLAG,
    "leave_out": None,
    "flat": _FLAG,
    "prefix_length": None,
    "non_linearity": None,
    "use_gating": _FLAG,
    "shared_gating": _FLAG,
    # The tensors say it, or it is used in training only.
    "bottleneck_size": None,
    "dropout": None,
    "init_weights_seed": None,
}
PREFIX_DEFAULTS: Config = {
    "encoder_prefix": True,
    "cross_prefix": True,
    "leave_out": [],
    "flat": False,
    "prefix_length": 30,
    "non_linearity": "tanh",
    "use_gating": False,
    "shared_gating": True,
}

PROMPT_KEYS: Mapping[str, Check | None] = {
    "architecture": None,
    "prompt_length": None,
    "combine": one_of("prefix", "prefix_after_bos"),
    # Where training began.
    "prompt_init": None,
    "prompt_init_text": None,
    "random_uniform_scale": None,
    "init_weights_seed": None,
}
PROMPT_DEFAULTS: Config = {"prompt_length": 10, "combine": "prefix"}

_ACTIVATIONS = {
    "linear": "identity",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
}
# What the names meant before configs carried a version.
_UNVERSIONED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_OLD_SCALING = re.compile(r"adapters\.(0\.|1\.0(\.|$))")


def activation(name: object, field: str = "non_linearity", *, versioned: bool = True) -> str:
    """Our name of the library's non-linearity."""
    if not isinstance(name, str):
        raise InvalidDelta(f"{field} must be a name", field=field)
    current = name if versioned else _UNVERSIONED.get(name, name)
    if current.lower() not in _ACTIVATIONS:
        raise UnsupportedDelta(
            f"{field} {shown(name)} is not served; served: {', '.join(_ACTIVATIONS)}", field=field
        )
    return _ACTIVATIONS[current.lower()]


def left_out(config: Config) -> frozenset[int]:
    """The layers without an adapter."""
    layers = config["leave_out"]
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InvalidDelta("leave_out must be a list of layer numbers", field="leave_out")
    return frozenset(layers)


def positive(config: Config, key: str) -> int:
    """A whole number of 1 or more."""
    value = config[key]
    if type(value) is not int or value < 1:
        raise InvalidDelta(f"{key} must be a whole number of 1 or more", field=key)
    return value


def attention_matrices(config: Config) -> Sequence[str]:
    """Those of q, k and v that have a change, in this order."""
    named = config["attn_matrices"]
    if not isinstance(named, list) or not set(map(str, named)) <= set("qkv"):
        raise UnsupportedDelta("attn_matrices may name q, k and v", field="attn_matrices")
    return [name for name in "qkv" if name in named]


def lora_scale(config: Config, version: object) -> float:
    """alpha / r. Versions before 1.1.0 did not scale what they trained (adapter-hub/adapters pull request 770)."""
    rank, alpha = number(config["r"], "r"), number(config["alpha"], "alpha")
    if rank < 1:
        raise InvalidDelta("r must be 1 or more", field="r")
    return 1.0 if old_scaling(version) else alpha / rank


def old_scaling(version: object) -> bool:
    """Whether the library reads alpha as r: files of that version were trained so."""
    return isinstance(version, str) and _OLD_SCALING.match(version) is not None
