"""The layers of Llama and its kin, leaf by leaf: what Hugging Face's forward pass computes, in a third of the operations.

A decode step of a small model spends more time in dispatch than in arithmetic: rotary embedding and gating are a dozen
torch operations a layer. Here each is one kernel on the packed output of its group. Norms, linears and embeddings stay
Hugging Face's modules, hooked by ``deltas.attach``; every rounding is where Hugging Face's own code rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltas.hooks import GroupHook, group_hook
from deltas.ops.rows import RowKernels
from server.engine.backbone import Backbone
from server.engine.kv import Attention

# pre-norm layers with rotary halves, SiLU gates and norms that the kernel computes as they do
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class _Layer:
    """One layer's leaves, looked up once. ``qkv`` and ``gate_up`` are whole groups."""

    norm: nn.Module
    qkv: GroupHook
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    o: nn.Module
    mlp_norm: nn.Module
    gate_up: GroupHook
    down: nn.Module
    scaling: float
    window: int | None


class LeanDecoder:
    """The body of one backbone whose modules are hooked; ``kernels`` are its ops'."""

    def __init__(self, backbone: Backbone, kernels: RowKernels) -> None:
        spec, self._body = backbone.spec, backbone.model.base_model
        self._kernels = kernels
        self._heads, self._kv_heads, self._width = spec.heads, spec.kv_heads, spec.head_dim
        self._layers: Sequence[_Layer] = [_layer(layer) for layer in self._body.layers]

    @staticmethod
    def of(backbone: Backbone, kernels: RowKernels | None) -> LeanDecoder | None:
        """None where Hugging Face's own forward pass has to do: another family or activation, or no kernels."""
        config = backbone.model.config
        if kernels is None or backbone.spec.family not in FAMILIES or config.hidden_act != "silu":
            return None
        return LeanDecoder(backbone, kernels)

    def __call__(self, attention: Attention, positions: Tensor, **inputs: Tensor) -> Tensor:
        """Last hidden states ``[1, tokens, hidden]``; arguments as :meth:`Runner.forward` has them."""
        hidden: Tensor = (
            inputs["inputs_embeds"] if "inputs_embeds" in inputs else self._embed(inputs["input_ids"])
        )
        cos, sin = (t[0] for t in self._body.rotary_emb(hidden, positions))
        for index, layer in enumerate(self._layers):
            attended = self._attend(index, layer, attention, layer.norm(hidden), cos, sin)
            hidden = hidden + layer.o(attended)
            both = layer.gate_up.whole(layer.mlp_norm(hidden))[0]
            gate, up = both.chunk(2, dim=-1)
            self._kernels.silu_mul(gate, up, gate)
            hidden = hidden + layer.down(gate[None])
        normed: Tensor = self._body.norm(hidden)
        return normed

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._body.embed_tokens(ids)
        return embedded

    def _attend(
        self, index: int, layer: _Layer, attention: Attention, normed: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """``[1, tokens, heads * head_dim]``."""
        packed = layer.qkv.whole(normed)[0]
        tokens, heads, kv_heads = packed.shape[0], self._heads, self._kv_heads
        qkv = packed.view(tokens, heads + 2 * kv_heads, self._width)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is None or layer.k_norm is None:
            self._kernels.rope(qkv[:, : heads + kv_heads], cos, sin)
        else:
            q, k = layer.q_norm(q[None])[0], layer.k_norm(k[None])[0]
            self._kernels.rope(q, cos, sin)
            self._kernels.rope(k, cos, sin)
        return attention(index, q, k, v, layer.scaling, layer.window).view(1, tokens, heads * self._width)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = getattr(attention.config, "sliding_window", None)
    return _Layer(
        norm=layer.input_layernorm,
        qkv=group_hook(attention.q_proj),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        o=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        gate_up=group_hook(mlp.gate_proj),
        down=mlp.down_proj,
        scaling=attention.scaling,
        window=window,
    )
