"""Sites of the three Gemmas: Llama's, with token embeddings times the root of the width.

Gemma 2 and 3 have a norm behind each sublayer as well: what a block site changes is what that norm gives, which is what
is added to the residual. Gemma 3 norms each head's queries and keys too. Their norms scale by one more than the weight.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from deltas.backbones.llama import Layout, decoder_spec
from deltas.sites import BackboneSpec


def describe(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``GemmaForCausalLM`` with this configuration. Raises as Llama's does."""
    return decoder_spec("gemma", config, revision, _layout(config))


def describe_second(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``Gemma2ForCausalLM`` with this configuration. Raises as Llama's does."""
    return decoder_spec("gemma2", config, revision, _layout(config, outer_norms=True))


def describe_third(config: PretrainedConfig, revision: str) -> BackboneSpec:
    """The spec of a ``Gemma3ForCausalLM``, which is text only, with this configuration. Raises as Llama's does."""
    return decoder_spec("gemma3_text", config, revision, _layout(config, outer_norms=True, heads_axis=-3))


def _layout(config: PretrainedConfig, *, outer_norms: bool = False, heads_axis: int = 0) -> Layout:
    bias, scale = bool(config.attention_bias), float(config.hidden_size) ** 0.5
    return Layout(qkv_bias=bias, o_bias=bias, outer_norms=outer_norms, heads_axis=heads_axis, scale=scale)
