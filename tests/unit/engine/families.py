"""Where Hugging Face's decoders keep what a delta changes, and their own models computing with a delta.

Written out apart from the product's tables. The reference is a copy of the stock model: with other parameters where a
delta gives them, with forward hooks that compute the delta's formula elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltas.delta import Component, Delta


@dataclass(frozen=True)
class Modules:
    """Module paths: of a layer's linears and norms (below the layer), and of what is outside the layers.

    ``blocks``: the module whose output is the sublayer's, the norm that is given the residual, the first linear.
    """

    layers: str
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    blocks: Mapping[str, tuple[str, str, str]]
    outside: Mapping[str, str] = field(default_factory=dict)

    def of(self, site: str) -> str:
        """The module of a linear, norm or embedding site."""
        if site in self.outside:
            return self.outside[site]
        _, index, leaf = site.split(".", 2)
        return f"{self.layers}.{index}.{(self.linears | self.norms)[leaf]}"  # type: ignore[operator]


_LLAMA_LINEARS = {f"attn.{leaf}": f"self_attn.{leaf}_proj" for leaf in "qkvo"} | {
    f"mlp.{leaf}": f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")
}
_LLAMA_NORMS = {"attn.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"}
_OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_HEADS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
_OUTER_NORMS = {
    "attn.norm": "input_layernorm",
    "attn.outer_norm": "post_attention_layernorm",
    "mlp.norm": "pre_feedforward_layernorm",
    "mlp.outer_norm": "post_feedforward_layernorm",
}
_LLAMA = Modules(
    layers="model.layers",
    linears=_LLAMA_LINEARS,
    norms=_LLAMA_NORMS,
    blocks={
        "attn.out": ("self_attn.o_proj", "input_layernorm", "self_attn.q_proj"),
        "mlp.out": ("mlp.down_proj", "post_attention_layernorm", "mlp.up_proj"),
    },
    outside=_OUTSIDE,
)
_OUTER = Modules(
    layers="model.layers",
    linears=_LLAMA_LINEARS,
    norms=_OUTER_NORMS,
    blocks={
        "attn.out": ("post_attention_layernorm", "input_layernorm", "self_attn.q_proj"),
        "mlp.out": ("post_feedforward_layernorm", "pre_feedforward_layernorm", "mlp.up_proj"),
    },
    outside=_OUTSIDE,
)

MODULES: Mapping[str, Modules] = {
    "gemma": _LLAMA,
    "gemma2": _OUTER,
    "gemma3_text": Modules(
        _OUTER.layers, _OUTER.linears, _OUTER_NORMS | _HEADS, _OUTER.blocks, _OUTER.outside
    ),
    "gpt_neox": Modules(
        layers="gpt_neox.layers",
        linears={
            "attn.qkv": "attention.query_key_value",
            "attn.o": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        norms=_LLAMA_NORMS,
        blocks={
            "attn.out": ("attention.dense", "input_layernorm", "attention.query_key_value"),
            "mlp.out": ("mlp.dense_4h_to_h", "post_attention_layernorm", "mlp.dense_h_to_4h"),
        },
        outside={"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
    ),
    "mistral": _LLAMA,
    "opt": Modules(
        layers="model.decoder.layers",
        linears={
            **{f"attn.{leaf}": f"self_attn.{leaf}_proj" for leaf in "qkv"},
            "attn.o": "self_attn.out_proj",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
        norms={"attn.norm": "self_attn_layer_norm", "mlp.norm": "final_layer_norm"},
        blocks={
            "attn.out": ("self_attn.out_proj", "self_attn_layer_norm", "self_attn.q_proj"),
            "mlp.out": ("fc2", "final_layer_norm", "fc1"),
        },
        outside={
            "embed": "model.decoder.embed_tokens",
            "embed.positions": "model.decoder.embed_positions",
            "norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
        },
    ),
    "qwen2": _LLAMA,
    "qwen3": Modules(_LLAMA.layers, _LLAMA_LINEARS, _LLAMA_NORMS | _HEADS, _LLAMA.blocks, _OUTSIDE),
}


def with_delta(stock: Any, modules: Modules, delta: Delta) -> tuple[Any, Tensor | None]:
    """A copy of the stock model that computes with the delta, and the embeddings that come before a row's own."""
    model = copy.deepcopy(stock)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # no longer tied
    before = None
    for component in delta.components:
        if component.method == "prompt":
            before = component.tensors["embeddings"]
            continue
        for site in component.sites():
            _change(model, modules, site, component, component.at(site))
    return model.requires_grad_(False), before


def _change(
    model: Any, modules: Modules, site: str, component: Component, tensors: Mapping[str, Tensor]
) -> None:
    if component.method == "bottleneck":
        _, index, leaf = site.split(".", 2)
        layer = model.get_submodule(f"{modules.layers}.{index}")
        _bottleneck(layer, modules.blocks[leaf], component, tensors)
        return
    module = model.get_submodule(modules.of(site))
    match component.method:
        case "lora":
            module.register_forward_hook(
                _adds(lambda x: component.config["scale"] * (x @ tensors["A"].T @ tensors["B"].T))
            )
        case "bitfit":
            module.register_forward_hook(_adds(lambda _: tensors["beta"]))
        case "dense":
            module.weight = nn.Parameter(module.weight + tensors["matrix"])
        case "ln" | "override":
            for name, values in tensors.items():
                setattr(module, name, nn.Parameter(values))


def _adds(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + change(args[0])

    return hook


def _bottleneck(
    layer: Any, places: tuple[str, str, str], component: Component, t: Mapping[str, Tensor]
) -> None:
    last, norm, inner = (layer.get_submodule(path) for path in places)
    seen: dict[str, Tensor] = {}

    def note(key: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            seen[key] = args[0]

        return hook

    def change(_: Any, __: Any, h: Tensor) -> Tensor:
        z = {
            "output": lambda: h,
            "output+residual": lambda: h + seen["i"].view(h.shape),
            "residual": lambda: seen["i"].view(h.shape),
            "inner": lambda: seen["entered"].view(h.shape),
        }[component.config["reads"]]()
        inside = functional.gelu(functional.linear(z, t["down"], t["down_bias"]))
        changed: Tensor = h + component.config["scale"] * functional.linear(inside, t["up"], t["up_bias"])
        return changed

    norm.register_forward_pre_hook(note("i"))
    inner.register_forward_pre_hook(note("entered"))
    last.register_forward_hook(change)


@torch.no_grad()
def greedy(model: Any, tokens: list[int], steps: int, before: Tensor | None = None) -> list[Tensor]:
    """The logits of each greedy step, each by a full pass without a cache."""
    ids, found = list(tokens), []
    for _ in range(steps):
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        if before is not None:
            embedded = torch.cat([before[None], embedded], dim=1)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
        found.append(logits)
        ids.append(int(logits.argmax()))
    return found
