"""Make ``fixtures/adapterhub``: bottleneck adapters of a tiny random Llama, as AdapterHub saves them.

Run it by hand, in a virtualenv of its own, because ``adapters`` pins an older transformers than the server's:

    python3.11 -m venv adapterhub-env
    adapterhub-env/bin/pip install "adapters==1.3.0" "transformers==4.57.6" torch safetensors
    adapterhub-env/bin/python tests/oracle/make_adapterhub_fixtures.py

It writes, into the folder given (by default ``fixtures/adapterhub`` beside this file):

    backbone/             the tiny backbone, a Hugging Face folder (float32)
    <case>/               what ``save_adapter`` wrote, untouched
    expected.safetensors  ``ids.<n>`` int64 [length]; the logits ``base.<n>`` and ``<case>.<n>``, float32
                          [length, vocab]
    index.json            the cases and the versions of the libraries that made them

The logits are those of a fresh model that *loaded* the saved folder, one unpadded sequence at a time and
without a key/value cache (adapters 1.3.0 does not fill one for Llama on transformers 4.57).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found,unused-ignore]
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

LENGTHS = (4, 9, 14)
BACKBONE_SEED = 20240


@dataclass(frozen=True)
class Case:
    """One adapter to make, and how to save it. Same ``config`` and ``seed``: same weights, so same logits."""

    folder: str
    name: str
    config: Any
    seed: int
    safetensors: bool = True
    with_head: bool = False
    headless_model: bool = False


DOUBLE = adapters.DoubleSeqBnConfig(reduction_factor=8)
CASES = (
    Case("seq_bn", "house_style", adapters.SeqBnConfig(reduction_factor=16), seed=1),
    Case("double_seq_bn", "support-tone", DOUBLE, seed=2),
    Case("par_bn", "legalese", adapters.ParBnConfig(reduction_factor=4), seed=3),
    # The same adapter in the older file form: both must be read as the same delta.
    Case("double_seq_bn_bin", "support-tone", DOUBLE, seed=2, safetensors=False),
    # save_adapter's own default on a causal model also writes a full copy of lm_head.
    Case(
        "seq_bn_with_head", "house_style", adapters.SeqBnConfig(reduction_factor=16), seed=1, with_head=True
    ),
    # Saved from LlamaModel, so that keys lack the "model." in front.
    Case(
        "seq_bn_headless",
        "house_style",
        adapters.SeqBnConfig(reduction_factor=16),
        seed=1,
        headless_model=True,
    ),
    Case("seq_bn_leave_out", "drop1", adapters.SeqBnConfig(reduction_factor=8, leave_out=[1]), seed=4),
    # Widths 12 (64 // 5), 4 (the default) and 1 (64 // 100 is 0, raised to 1).
    Case(
        "double_seq_bn_by_layer",
        "by_layer",
        adapters.DoubleSeqBnConfig(reduction_factor={"0": 5, "2": 100, "default": 16}),
        seed=5,
    ),
    # "gelu" is the exact one where the config has a version; a scaling other than the preset's.
    Case(
        "par_bn_gelu",
        "gelu",
        adapters.ParBnConfig(reduction_factor=8, non_linearity="gelu", scaling=0.5),
        seed=6,
    ),
)


def make_backbone() -> LlamaForCausalLM:
    """A float32 Llama with weights large enough that attention and norms are far from trivial."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    generator = torch.Generator().manual_seed(BACKBONE_SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[1]))
    return model


def redraw(model: nn.Module, name: str, seed: int) -> None:
    """Give every tensor of the adapter noticeable random values: fresh adapters are all but the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if f".adapters.{name}." not in key:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 1 else 0.8 / math.sqrt(parameter.shape[1])
            parameter.copy_(noise * scale)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 logits ``[length, vocab]`` of one sequence ``[length]``."""
    result: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return result.float().contiguous()


def fresh(backbone: Path, model_class: Any = LlamaForCausalLM) -> Any:
    """The backbone from disk, ready for adapters."""
    model = model_class.from_pretrained(backbone, dtype=torch.float32, attn_implementation="eager")
    adapters.init(model)
    return model.eval()


def make_case(case: Case, root: Path, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Save one adapter, load it into a fresh model and return that model's logits for each prompt."""
    backbone, folder = root / "backbone", root / case.folder
    source = fresh(backbone, LlamaModel if case.headless_model else LlamaForCausalLM)
    source.add_adapter(case.name, config=case.config)
    redraw(source, case.name, case.seed)
    extra = {} if case.headless_model else {"with_head": case.with_head}
    source.save_adapter(str(folder), case.name, use_safetensors=case.safetensors, **extra)

    model = fresh(backbone)
    info: dict[str, list[str]] = {}
    model.load_adapter(str(folder), use_safetensors=case.safetensors, loading_info=info, set_active=True)
    lost = info.get("missing_keys", []) + info.get("unexpected_keys", [])
    if any(".adapters." in key for key in lost):
        raise RuntimeError(f"{case.folder}: the library itself did not load {lost}")
    model.eval()
    loaded = [logits(model, ids) for ids in prompts]

    if not case.headless_model:
        source.set_active_adapters(case.name)
        source.eval()
        for ids, got in zip(prompts, loaded, strict=True):
            if not torch.equal(logits(source, ids), got):
                raise RuntimeError(f"{case.folder}: loading back gives other logits than before saving")
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).parent / "fixtures" / "adapterhub"
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    root: Path = parser.parse_args().folder
    if root.exists():
        if not (root / "index.json").is_file():
            parser.error(f"{root} exists and was not made by this script")
        shutil.rmtree(root)
    root.mkdir(parents=True)
    # The library writes the backbone's path into every config: make it a relative one.
    os.chdir(root)
    root = Path()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    model = make_backbone()
    model.save_pretrained(root / "backbone")
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    base = [logits(model, ids) for ids in prompts]

    tensors = {f"ids.{n}": ids for n, ids in enumerate(prompts)}
    tensors |= {f"base.{n}": tensor for n, tensor in enumerate(base)}
    for case in CASES:
        results = make_case(case, root, prompts)
        for n, (got, plain) in enumerate(zip(results, base, strict=True)):
            change = float((got - plain).abs().max() / plain.abs().max())
            if change < 0.1:
                raise RuntimeError(f"{case.folder}: the adapter hardly changes the logits ({change:.3g})")
            tensors[f"{case.folder}.{n}"] = got
        print(f"{case.folder}: max |logit| {max(float(t.abs().max()) for t in results):.2f}")
    save_file(tensors, root / "expected.safetensors")
    index = {
        "cases": {case.folder: {"name": case.name, "seed": case.seed} for case in CASES},
        "prompts": len(prompts),
        "versions": {
            "adapters": adapters.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (root / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
