"""Sites of Qwen2 and Qwen2.5: Llama's, with biases on queries, keys and values."""

from __future__ import annotations

from transformers import PretrainedConfig

from deltas.backbones.llama import Layout, decoder_spec
from deltas.sites import BackboneSpec


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``Qwen2ForCausalLM`` with this configuration. Raises as Llama's does."""
    return decoder_spec("qwen2", config, revision, Layout(qkv_bias=True))
