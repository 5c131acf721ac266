"""Sites of Qwen3: Llama's, with a norm of each head's queries and of its keys."""

from __future__ import annotations

from transformers import PretrainedConfig

from deltas.backbones.llama import Layout, decoder_spec
from deltas.sites import BackboneSpec


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``Qwen3ForCausalLM`` with this configuration. Raises as Llama's does."""
    bias = bool(config.attention_bias)
    layout = Layout(qkv_bias=bias, o_bias=bias, heads_axis=-2, norms_by_linear=True)
    return decoder_spec("qwen3", config, revision, layout)
