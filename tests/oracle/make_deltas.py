"""Random deltas for the oracle tests, in their sources' own file layouts and without those sources.

``write_bottleneck`` makes a folder that AdapterHub's library would have saved for any Llama-like config; a
test holds its layout to folders that the library did save. Imports nothing of ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Kind = Literal["seq_bn", "double_seq_bn", "par_bn"]

# What the library's presets share, and where they differ.
COMMON: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
PRESETS: dict[Kind, dict[str, Any]] = {
    "seq_bn": {"original_ln_before": True},
    "double_seq_bn": {"mh_adapter": True, "non_linearity": "swish"},
    "par_bn": {"init_weights": "mam_adapter", "is_parallel": True, "scaling": 4.0},
}
MODULES = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}


def write_bottleneck(
    folder: Path,
    config: Any,
    kind: Kind,
    *,
    name: str,
    reduction_factor: float | Mapping[str, float] = 16,
    seed: int = 0,
    scale: float = 1.0,
    leave_out: Sequence[int] = (),
    form: Literal["safetensors", "bin"] = "safetensors",
) -> dict[str, Tensor]:
    """Write ``adapter_config.json`` and the weights of a random adapter; returns the float32 tensors written.

    Of ``config``, a Llama-like Hugging Face config, ``hidden_size``, ``num_hidden_layers`` and ``model_type``
    are used. ``scale`` sizes the change: it multiplies the second factor and its bias, whose entries are
    otherwise about ``0.1 / sqrt(width)`` and ``0.02``, both divided by the preset's own scaling so that kinds
    compare.
    """
    options = {**COMMON, **PRESETS[kind], "leave_out": list(leave_out), "reduction_factor": reduction_factor}
    hidden = int(config.hidden_size)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float) -> Tensor:
        return torch.randn(shape, generator=generator) * size

    tensors: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        if layer in leave_out:
            continue
        factor = reduction_factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default", math.nan))
        inner = max(1, int(hidden // factor))
        for option, module in MODULES.items():
            if not options[option]:
                continue
            prefix = f"model.layers.{layer}.{module}.adapters.{name}."
            size = scale / options["scaling"]
            tensors[prefix + "adapter_down.0.weight"] = draw(inner, hidden, size=1 / math.sqrt(hidden))
            tensors[prefix + "adapter_down.0.bias"] = draw(inner, size=0.1)
            tensors[prefix + "adapter_up.weight"] = draw(hidden, inner, size=0.1 * size / math.sqrt(inner))
            tensors[prefix + "adapter_up.bias"] = draw(hidden, size=0.02 * size)

    record = {
        "config": options,
        "hidden_size": hidden,
        "model_class": "LlamaForCausalLM",
        "model_name": "backbone",
        "model_type": config.model_type,
        "name": name,
        "version": "adapters.1.3.0",
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    if form == "bin":
        torch.save(tensors, folder / "pytorch_adapter.bin")
    else:
        save_file(tensors, folder / "adapter.safetensors")
    return tensors


def random_shifts(model: nn.Module, *, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """A BitFit delta: a vector for every linear and norm inside ``model.layers`` and for the last norm.

    Module path -> ``[out_features]``, float32. Entries are about ``0.02 * scale`` at linears and norms alike.
    """
    generator = torch.Generator().manual_seed(seed)
    shifts: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path == "model.norm" or (
            path.startswith("model.layers.") and (isinstance(module, nn.Linear) or path.endswith("layernorm"))
        ):
            size = module.get_parameter("weight").shape[0]
            shifts[path] = torch.randn(size, generator=generator) * 0.02 * scale
    return shifts
