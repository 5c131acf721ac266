"""The backbone's own tensors, for what depends on them: DoRA's norms, absolute values, files that repeat some of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deltas.errors import UnsupportedDelta
from deltas.sites import BackboneSpec, Site, SiteKind

Source = Callable[[str], Tensor | None]
"""The backbone's tensor of that state-dict key, if it has one."""

# A tied module has no tensor of its own in the file.
_TIED = {
    "lm_head.weight": (
        "embed_out.weight",  # GPT-NeoX's own name for it
        *("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "shared.weight"),
        "model.shared.weight",  # BART's
        *("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        *("gpt_neox.embed_in.weight", "embed_in.weight"),
    ),
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
    "vocab_projector.weight": ("distilbert.embeddings.word_embeddings.weight",),
    "decoder.weight": ("model.embeddings.tok_embeddings.weight",),
    "lm_head.decoder.weight": ("roberta.embeddings.word_embeddings.weight",),
    "lm_head.decoder.bias": ("lm_head.bias",),
    "model.encoder.embed_tokens.weight": ("model.shared.weight", "shared.weight"),
    "model.decoder.embed_tokens.weight": ("model.shared.weight", "shared.weight"),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
}


# How the first BERTs, bert-base-uncased among them, name the parameters of their norms; transformers reads both.
_OLD_NAMES = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


class FrozenTensors:
    """Tensors of a folder in Hugging Face's layout, by state-dict key. Nothing is read before one is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _files(self) -> dict[str, Path]:
        index, single = self._folder / "model.safetensors.index.json", self._folder / "model.safetensors"
        if index.is_file():
            shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {key: self._folder / Path(file).name for key, file in shards.items()}
        if not single.is_file():
            return {}
        with safe_open(str(single), framework="pt") as file:
            return dict.fromkeys(file.keys(), single)

    def __call__(self, key: str) -> Tensor | None:
        """The tensor, or None if the backbone has none of that name."""
        old = (key.removesuffix(new) + gone for new, gone in _OLD_NAMES if key.endswith(new))
        for name in (key, *_TIED.get(key, ()), *old):
            if name in self._files:
                with safe_open(str(self._files[name]), framework="pt", device="cpu") as file:
                    tensor: Tensor = file.get_tensor(name)
                return tensor
        return None


class SiteWeights:
    """The backbone's weights by site, in float32 and in torch's layout whatever the module's own."""

    def __init__(self, spec: BackboneSpec, source: Source | None) -> None:
        self.spec = spec
        self._source = source

    def weight(self, site: Site) -> Tensor:
        """``[out, in]`` of a linear (a part's rows only), ``[n]`` of a norm, ``[rows, width]`` of an embedding.

        Raises :class:`UnsupportedDelta` where the weights are not at hand.
        """
        weight = self._find(f"{site.path}.weight")
        if weight is None:
            raise self._missing(site)
        weight = weight.to(torch.float32)
        if site.kind is SiteKind.LINEAR:
            if self._transposed(site):
                weight = weight.T
            weight = weight[site.offset : site.offset + site.out_features]
        return weight.contiguous()

    def bias(self, site: Site) -> Tensor | None:
        """``[out]`` of a linear or norm, None where it has no bias. Raises as :meth:`weight` does."""
        bias = self._find(f"{site.path}.bias") if site.bias else None
        if bias is None:
            if site.bias:
                raise self._missing(site)
            return None
        return bias.to(torch.float32)[site.offset : site.offset + site.out_features].contiguous()

    def _missing(self, site: Site) -> UnsupportedDelta:
        return UnsupportedDelta(
            f"{site.name}: the delta depends on the backbone's weights, which are not at hand",
            field=site.name,
        )

    def _transposed(self, site: Site) -> bool:
        return self.spec.conv1d and site.name != "head"

    def _find(self, key: str) -> Tensor | None:
        if self._source is None:
            return None
        found = self._source(key)
        if found is None and self.spec.base_prefix and key.startswith(f"{self.spec.base_prefix}."):
            found = self._source(key.removeprefix(f"{self.spec.base_prefix}."))
        return found
