"""AdapterHub's files: ``adapter_config.json`` and ``adapter.safetensors``. Read so far: bottleneck adapters.

With h a sublayer's output, i the residual and no norm after the sum (pre-norm models), the library computes

    sequential   z = h + i if original_ln_before else h
                 out = up(z) + (h if residual_before_ln else z) + (i if original_ln_after else 0)
    parallel     out = up(i) + h + (i if original_ln_after else 0)

and a :class:`~deltas.patches.Bottleneck` gives ``up(z) + h + i``. Whatever has another sum is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import DeltaFiles, listed
from deltas.formats.frozen import Frozen, same
from deltas.formats.header import shown
from deltas.formats.plan import (
    Check,
    Plan,
    PlannedComponent,
    absent,
    check_config,
    one_of,
    printable,
    provenance,
    refuse_unknown,
)
from deltas.methods.base import number
from deltas.patches import BlockInput
from deltas.sites import BackboneSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
PICKLED = "pytorch_adapter.bin"
HEAD_CONFIG = "head_config.json"
HEAD = "model_head.safetensors"
PICKLED_HEAD = "pytorch_model_head.bin"
LM_HEAD = "lm_head.weight"

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
    # Read below.
    "mh_adapter": _FLAG,
    "output_adapter": _FLAG,
    "reduction_factor": None,
    "non_linearity": None,
    "scaling": None,
    "is_parallel": _FLAG,
    "original_ln_before": _FLAG,
    "original_ln_after": _FLAG,
    "residual_before_ln": _FLAG,  # not "post_add", which fails in the library where no norm follows
    "leave_out": None,
    # Other mathematics.
    "architecture": absent,
    "ln_before": absent,
    "ln_after": absent,
    "use_gating": absent,
    "inv_adapter": absent,
    "invertible_adapter": absent,
    "cross_adapter": absent,
    "phm_layer": absent,
    # Without effect while the options above are off, or used in training only.
    "adapter_residual_before_ln": _FLAG,
    "inv_adapter_reduction_factor": None,
    "phm_dim": None,
    "phm_bias": None,
    "phm_c_init": None,
    "phm_init_range": None,
    "phm_rank": None,
    "factorized_phm_W": None,
    "factorized_phm_rule": None,
    "shared_W_phm": None,
    "shared_phm_rule": None,
    "learn_phm": None,
    "hypercomplex_nonlinearity": None,
    "init_weights": None,
    "init_weights_seed": None,
    "dropout": None,
    "stochastic_depth": None,
}

# The library's defaults for keys that a config may leave out.
_DEFAULTS: Mapping[str, Any] = {
    "scaling": 1.0,
    "is_parallel": False,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "leave_out": [],
}

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

# Where each location's adapters are, by backbone family: config flag -> (module in a layer, site in a layer).
_PLACES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "llama": {
        "mh_adapter": ("attention_adapters", "attn.out"),
        "output_adapter": ("output_adapters", "mlp.out"),
    }
}
_PARAMETERS = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}


def plan(files: DeltaFiles, spec: BackboneSpec) -> Plan:
    """What to load. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the key or tensor."""
    outer = files.json(CONFIG)
    check_config(outer, TOP_KEYS, CONFIG)
    if spec.family not in _PLACES or outer.get("model_type") != spec.family:
        raise UnsupportedDelta(
            f"model_type is {shown(outer.get('model_type'))}, the backbone is {spec.family}; "
            f"bottleneck adapters are served for {', '.join(_PLACES)}",
            field="model_type",
        )
    if outer.get("hidden_size") != spec.hidden:
        raise InvalidDelta(
            f"hidden_size is {shown(outer.get('hidden_size'))}, the backbone's is {spec.hidden}",
            field="hidden_size",
        )
    inner = outer.get("config")
    if not isinstance(inner, dict):
        raise InvalidDelta("config must be an object", field="config")
    if inner.get("architecture") is not None:
        raise UnsupportedDelta(
            f"AdapterHub's {shown(inner['architecture'])} is not served; served: bottleneck adapters "
            "(no architecture)",
            field="architecture",
        )
    check_config(inner, BOTTLENECK_KEYS, f"{CONFIG}: config")
    config = {**_DEFAULTS, **inner}
    if WEIGHTS in files and PICKLED in files:
        raise InvalidDelta(f"send {WEIGHTS} or {PICKLED}, not both", field=PICKLED)
    weights = PICKLED if PICKLED in files else WEIGHTS
    component = PlannedComponent(
        "bottleneck",
        {
            "activation": _activation(config.get("non_linearity"), versioned="version" in outer),
            "reads": _reads(config).value,
            "scale": _scale(config["scaling"]),
        },
        _sources(config, outer.get("name"), files, weights, spec),
    )
    return Plan("adapterhub", weights, (component,), provenance(outer, ("model_name", "name", "version")))


def check_head(files: DeltaFiles, frozen: Frozen | None) -> None:
    """Accept a head that is the backbone's own language-model head, which ``save_adapter`` writes by default.

    Anything else would have to be served, so it is refused: :class:`UnsupportedDelta` names the file.
    """
    advice = "leave out the head's files (save_adapter(..., with_head=False)) unless you trained it"
    if HEAD in files and PICKLED_HEAD in files:
        raise InvalidDelta(f"send {HEAD} or {PICKLED_HEAD}, not both", field=PICKLED_HEAD)
    name = PICKLED_HEAD if PICKLED_HEAD in files else HEAD
    whole = HEAD_CONFIG in files and name in files
    if not whole or files.json(HEAD_CONFIG).get("config", "absent") is not None:
        present = next(file for file in (HEAD_CONFIG, HEAD, PICKLED_HEAD) if file in files)
        raise UnsupportedDelta(f"{present}: task heads are not served yet; {advice}", field=present)
    if set(files.header(name).tensors) != {LM_HEAD}:
        raise UnsupportedDelta(f"{name}: only the backbone's own {LM_HEAD} may be here; {advice}", field=name)
    own = None if frozen is None else frozen(LM_HEAD)
    if own is None or not same(files.tensors(name, [LM_HEAD])[LM_HEAD], own):
        raise UnsupportedDelta(
            f"{name}: {LM_HEAD} differs from the backbone's, and trained language-model heads are not served; "
            f"{advice}",
            field=name,
        )


def _activation(name: object, *, versioned: bool) -> str:
    if not isinstance(name, str):
        raise InvalidDelta("non_linearity must be a name", field="non_linearity")
    current = name if versioned else _UNVERSIONED.get(name, name)
    if current.lower() not in _ACTIVATIONS:
        raise UnsupportedDelta(
            f"non_linearity {shown(name)} is not served; served: {', '.join(_ACTIVATIONS)}",
            field="non_linearity",
        )
    return _ACTIVATIONS[current.lower()]


def _scale(scaling: object) -> float:
    if isinstance(scaling, str):
        raise UnsupportedDelta(f"a trained scaling ({shown(scaling)}) is not served yet", field="scaling")
    return number(scaling, "scaling")


def _reads(config: Mapping[str, Any]) -> BlockInput:
    """What the adapter reads, for the configurations whose sum is ``up(z) + h + i``."""
    before, after, residual_is_h = (
        config[key] for key in ("original_ln_before", "original_ln_after", "residual_before_ln")
    )
    if config["is_parallel"]:
        if not after:
            raise UnsupportedDelta("a parallel adapter drops the residual", field="original_ln_after")
        return BlockInput.RESIDUAL
    z_is_sum = before
    keeps_h_only = residual_is_h or not z_is_sum
    if keeps_h_only != after:
        raise UnsupportedDelta(
            f"with original_ln_before {before}, original_ln_after {after} and residual_before_ln "
            f"{residual_is_h} the residual is added {'twice' if after else 'never'}, which is not served",
            field="residual_before_ln" if after else "original_ln_after",
        )
    return BlockInput.OUTPUT_AND_RESIDUAL if z_is_sum else BlockInput.OUTPUT


def _sources(
    config: Mapping[str, Any], name: object, files: DeltaFiles, weights: str, spec: BackboneSpec
) -> dict[str, str]:
    """Canonical tensor -> tensor in the file, for all that the config promises and nothing else."""
    header = files.header(weights)
    if not isinstance(name, str) or not name:
        raise InvalidDelta("name must be the adapter's name", field="name")
    # Saved from a model without a language model's head, keys lack the base model's name in front.
    inside = "" if any(key.startswith("layers.") for key in header.tensors) else "model."
    sources: dict[str, str] = {}
    widths: dict[str, int] = {}
    for index, place, site in _locations(config, spec):
        stem = f"{inside}layers.{index}.{place}.adapters.{name}"
        for parameter, suffix in _PARAMETERS.items():
            sources[f"{site}/{parameter}"] = f"{stem}.{suffix}"
        widths[f"{stem}.{_PARAMETERS['down']}"] = _width(config.get("reduction_factor"), index, spec.hidden)
    expected = set(sources.values())
    refuse_unknown([key for key in header.tensors if key not in expected], weights)
    missing = [key for key in sources.values() if key not in header.tensors]
    if missing:
        raise InvalidDelta(f"{weights}: missing tensors: {listed(missing)}", field=missing[0])
    if not sources:
        raise InvalidDelta("the config places no adapter in any layer", field="config")
    for key, width in widths.items():
        shape = header.tensors[key].shape
        if not shape or shape[0] != width:
            raise InvalidDelta(
                f"{shown(key)} has shape {list(shape)}, but reduction_factor gives a width of {width}",
                field="reduction_factor",
            )
    return sources


def _locations(config: Mapping[str, Any], spec: BackboneSpec) -> Iterator[tuple[int, str, str]]:
    """Layer index, module name and site of every adapter."""
    left_out = config["leave_out"]
    if not isinstance(left_out, list) or not all(type(layer) is int for layer in left_out):
        raise InvalidDelta("leave_out must be a list of layer numbers", field="leave_out")
    skipped = set(left_out)
    for flag in ("mh_adapter", "output_adapter"):
        if flag not in config:
            raise InvalidDelta(f"config lacks {flag}", field=flag)
        if not config[flag]:
            continue
        place, site = _PLACES[spec.family][flag]
        for index in range(spec.layers):
            if index not in skipped:
                yield index, place, f"layers.{index}.{site}"


def _width(factor: object, layer: int, hidden: int) -> int:
    """The bottleneck's width in a layer; the factor is a number, or an object by layer with a default."""
    if isinstance(factor, Mapping):
        factor = factor.get(str(layer), factor.get("default"))
        if factor is None:
            raise InvalidDelta(f"reduction_factor has no entry for layer {layer}", field="reduction_factor")
    value = number(factor, "reduction_factor")
    if value <= 0:
        raise InvalidDelta(
            f"reduction_factor must be above 0, not {printable(str(value))}", field="reduction_factor"
        )
    return max(1, int(min(hidden // value, float(1 << 40))))
