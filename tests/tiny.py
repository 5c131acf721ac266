"""A tiny random Llama with a byte-level tokenizer and a chat template, in Hugging Face's layout: starts in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.formats import native
from deltas.sites import BackboneSpec, SiteKind

SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_backbone(folder: Path, *, seed: int = 0, positions: int = 256) -> Path:
    """Writes the model and its tokenizer into ``folder`` and returns it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config(vocab=len(vocab), positions=positions)).save_pretrained(folder)
    return folder


def llama_config(*, vocab: int = 64, positions: int = 64) -> LlamaConfig:
    """Two layers, grouped heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )


def random_delta(spec: BackboneSpec, kind: str, seed: int, *, size: float = 0.3) -> Delta:
    """A random delta in canonical form: ``lora``, ``bitfit``, ``prompt`` or ``bottleneck``; rank and length by seed."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make) * size

    rank = 2 + seed % 5
    linears = spec.of_kind(SiteKind.LINEAR)
    if kind == "lora":
        tensors = {}
        for site in linears:
            if site.name != "head":
                tensors[f"{site.name}/A"] = draw(rank, site.in_features)
                tensors[f"{site.name}/B"] = draw(site.out_features, rank)
        return Delta((Component("lora", {"scale": 0.5}, tensors),))
    if kind == "bitfit":
        sites = [*linears, *spec.of_kind(SiteKind.NORM)]
        return Delta((Component("bitfit", {}, {f"{s.name}/beta": draw(s.out_features) for s in sites}),))
    if kind == "prompt":
        return Delta((Component("prompt", {}, {"embeddings": draw(1 + seed % 7, spec.hidden)}),))
    tensors = {}
    for site in spec.of_kind(SiteKind.BLOCK):
        if site.name.endswith("mlp.out"):
            tensors[f"{site.name}/down"] = draw(rank, spec.hidden)
            tensors[f"{site.name}/down_bias"] = draw(rank)
            tensors[f"{site.name}/up"] = draw(spec.hidden, rank)
            tensors[f"{site.name}/up_bias"] = draw(spec.hidden)
    config = {"activation": "relu", "reads": "output+residual", "scale": 1.0}
    return Delta((Component("bottleneck", config, tensors),))


def native_files(backbone: Path, folder: Path) -> Callable[[str, int], Path]:
    """Makes a random delta of a kind and a seed in the native format, the same one each time."""
    spec = describe(AutoConfig.from_pretrained(backbone), "any")
    folder.mkdir(exist_ok=True)

    def make(kind: str, seed: int) -> Path:
        path = folder / f"{kind}-{seed}.safetensors"
        if not path.exists():
            native.save(random_delta(spec, kind, seed), path)
        return path

    return make


KINDS = ("lora", "bitfit", "prompt", "bottleneck")
