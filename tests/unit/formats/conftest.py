"""A tiny Llama, hand-made safetensors files, and patches applied by plain hooks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from deltas.backbones import describe
from deltas.patches import Activation, BlockInput, Bottleneck, LowRank, Patch, Shift, SoftPrompt
from deltas.sites import BackboneSpec

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: functional.relu,
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.fixture(scope="session")
def llama_config() -> LlamaConfig:
    """Two layers, a head size of its own, biases in attention."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        attention_bias=True,
        vocab_size=64,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def spec(llama_config: LlamaConfig) -> BackboneSpec:
    return describe(llama_config, "test")


@pytest.fixture
def llama(llama_config: LlamaConfig) -> LlamaForCausalLM:
    """Always the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config).eval()


@pytest.fixture
def quiet() -> Iterator[None]:
    """For code of other libraries that warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small LoRA's files as PEFT writes them."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    config |= {"target_modules": ["q_proj"], "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    shapes = {"A": (2, 32), "B": (40, 2)}
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(2)
        for side, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def write(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + raw + data)
    return path


@pytest.fixture
def write_file() -> Callable[..., Path]:
    return write


@torch.no_grad()
def patched_logits(
    model: LlamaForCausalLM, spec: BackboneSpec, patches: Sequence[Patch], ids: Tensor
) -> Tensor:
    """Float32 logits ``[length, vocab]`` of ``ids`` ``[length]`` with patches applied by hooks."""
    embeddings = model.get_input_embeddings()(ids[None])
    start = 0
    with ExitStack() as stack:
        for patch in patches:
            if isinstance(patch, SoftPrompt):
                start = len(patch.embeddings)
                embeddings = torch.cat([patch.embeddings[None], embeddings], dim=1)
            else:
                stack.enter_context(_hooked(model, spec, patch))
        logits: Tensor = model(inputs_embeds=embeddings, use_cache=False).logits[0, start:]
    return logits


@pytest.fixture
def apply() -> Callable[..., Tensor]:
    return patched_logits


@contextmanager
def _hooked(model: nn.Module, spec: BackboneSpec, patch: Patch) -> Iterator[None]:
    assert not isinstance(patch, SoftPrompt)
    handles = []
    residual: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(patch, LowRank):
            return output + (args[0] @ patch.down.T) @ patch.up
        if isinstance(patch, Shift):
            return output + patch.beta
        assert isinstance(patch, Bottleneck)
        z = {
            BlockInput.OUTPUT: output,
            BlockInput.RESIDUAL: residual[-1],
            BlockInput.OUTPUT_AND_RESIDUAL: output + residual[-1],
        }[patch.reads]
        inner = ACTIVATIONS[patch.activation](z @ patch.down.T + patch.down_bias)
        return output + inner @ patch.up + patch.up_bias

    if isinstance(patch, Bottleneck):
        norm = spec.sites[patch.site.replace(".out", ".norm")]
        module = model.get_submodule(norm.path)
        handles.append(module.register_forward_pre_hook(lambda _, args: residual.append(args[0])))
    handles.append(model.get_submodule(spec.sites[patch.site].path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
