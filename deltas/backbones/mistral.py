"""Sites of Mistral: Llama's, without biases. Its attention may see a window of tokens only, as the engine's knows."""

from __future__ import annotations

from transformers import PretrainedConfig

from deltas.backbones.llama import Layout, decoder_spec
from deltas.sites import BackboneSpec


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``MistralForCausalLM`` with this configuration. Raises as Llama's does."""
    return decoder_spec("mistral", config, revision, Layout())
