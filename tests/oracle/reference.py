"""A plain PyTorch reference for bottleneck adapters and BitFit: stock Hugging Face modules and forward hooks.

Written apart from the product's code, and it must stay so: it imports torch, safetensors and nothing of ours,
so that agreement with it means something. ``test_reference.py`` holds it to AdapterHub's own output. Slow and
simple on purpose.

    with bottleneck(model, folder):          # an adapter folder as AdapterHub saves it
        expected = logits(model, ids)
    with bitfit(model, {"model.layers.0.self_attn.q_proj": beta}):
        expected = logits(model, ids)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "swish": functional.silu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": functional.leaky_relu,
}

# Options this reference knows in one value only; anything else in an adapter's config is an error.
FIXED: dict[str, Any] = {
    "cross_adapter": False,
    "inv_adapter": None,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "phm_layer": False,
    "residual_before_ln": True,
    "use_gating": False,
}

# By config option, a location in a decoder layer: the adapter's module there in AdapterHub's naming, the
# sublayer whose output it changes, and the norm whose *input* is the residual that is added to that output.
LOCATIONS = {
    "mh_adapter": ("attention_adapters", "self_attn", "input_layernorm"),
    "output_adapter": ("output_adapters", "mlp", "post_attention_layernorm"),
}
PARAMETERS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")


@torch.no_grad()
def logits(model: nn.Module, ids: Sequence[int] | Tensor) -> Tensor:
    """Float32 logits ``[length, vocab]`` of one unpadded sequence, without a key/value cache."""
    row = torch.as_tensor(ids, dtype=torch.long, device=next(model.parameters()).device)
    result: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return result.float()


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The ``new_tokens`` most likely tokens after ``prompt``, with no regard to end-of-sequence tokens."""
    device = next(model.parameters()).device
    fed = torch.as_tensor(prompt, dtype=torch.long, device=device)[None]
    cache, chosen = None, []
    for _ in range(new_tokens):
        out = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        fed = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        chosen.append(int(fed))
    return chosen


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an AdapterHub folder, ``.safetensors`` before ``.bin``."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights = folder / "adapter.safetensors"
    if weights.exists():
        return config, load_file(weights)
    tensors: dict[str, Tensor] = torch.load(
        folder / "pytorch_adapter.bin", map_location="cpu", weights_only=True
    )
    return config, tensors


@contextmanager
def bottleneck(model: Any, folder: Path) -> Iterator[None]:
    """Let a ``LlamaForCausalLM`` compute with the AdapterHub adapter in ``folder`` while the context lasts.

    Raises ValueError where the config asks for mathematics that is not written here, or where a tensor is
    missing or left over.
    """
    record, tensors = read_adapter(folder)
    config = record["config"]
    strange = {key: config[key] for key, value in FIXED.items() if config[key] != value}
    if strange or not isinstance(config["scaling"], float) or "version" not in record:
        raise ValueError(f"no reference for {strange or record}")
    left = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}

    handles: list[RemovableHandle] = []
    try:
        for index, layer in enumerate(model.model.layers):
            for option, (module, sublayer, norm) in LOCATIONS.items():
                if not config[option] or index in config["leave_out"]:
                    continue
                prefix = f"layers.{index}.{module}.adapters.{record['name']}."
                missing = [prefix + name for name in PARAMETERS if prefix + name not in left]
                if missing:
                    raise ValueError(f"the adapter lacks {missing}")
                factors = [left.pop(prefix + name) for name in PARAMETERS]
                if factors[0].shape[0] != width(config["reduction_factor"], index, model.config.hidden_size):
                    raise ValueError(f"{prefix}: width {factors[0].shape[0]} is not what the config says")
                handles += _hook(getattr(layer, sublayer), getattr(layer, norm), factors, config)
        if left:
            raise ValueError(f"tensors left over: {sorted(left)}")
        yield
    finally:
        for handle in handles:
            handle.remove()


def width(reduction_factor: float | Mapping[str, float], layer: int, hidden: int) -> int:
    """The bottleneck's width in one layer: hidden / factor rounded down, at least 1."""
    if isinstance(reduction_factor, Mapping):
        factor = reduction_factor.get(str(layer), reduction_factor.get("default"))
        if factor is None:
            raise ValueError(f"no reduction factor for layer {layer}")
    else:
        factor = reduction_factor
    return max(1, int(hidden // factor))


def _hook(
    sublayer: nn.Module, norm: nn.Module, factors: Sequence[Tensor], config: Mapping[str, Any]
) -> list[RemovableHandle]:
    """Change ``sublayer``'s output h to ``h + scaling * (U f(D z + d) + u)``; the layer itself then adds i.

    i is the residual. z is i for a parallel adapter, h + i for a sequential one that reads after the addition
    (``original_ln_before``), and h otherwise. No norm is applied to z or to the sum: the library has none to
    apply on Llama.
    """
    down, down_bias, up, up_bias = factors
    activation = ACTIVATIONS[config["non_linearity"].lower()]
    residual: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
        residual[:] = [args[0]]

    def change(_: nn.Module, __: Any, output: Any) -> Any:
        h: Tensor = output[0] if isinstance(output, tuple) else output
        i = residual.pop()
        if config["is_parallel"]:
            z = i
        elif config["original_ln_before"]:
            z = h + i
        else:
            z = h
        inner = activation(functional.linear(z, down.to(z), down_bias.to(z)))
        changed = h + functional.linear(inner, up.to(z), up_bias.to(z)) * config["scaling"]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return [norm.register_forward_pre_hook(remember), sublayer.register_forward_hook(change)]


@contextmanager
def bitfit(model: nn.Module, shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """Add a vector to the outputs of the named modules (linears and norms), while the context lasts.

    ``shifts`` maps a module's path in ``model`` to ``[out_features]``. Raises AttributeError for an unknown
    path and ValueError for a wrong shape.
    """
    handles: list[RemovableHandle] = []

    def shift(beta: Tensor, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + beta.to(output)

    try:
        for path, beta in shifts.items():
            module = model.get_submodule(path)
            weight = module.get_parameter("weight")
            if beta.shape != weight.shape[:1]:
                raise ValueError(f"{path}: shift of shape {list(beta.shape)}, weight {list(weight.shape)}")
            handles.append(module.register_forward_hook(partial(shift, beta)))
        yield
    finally:
        for handle in handles:
            handle.remove()
