"""The backbone's own tensors, from its folder: what an upload that repeats some of them is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# A tied head has no tensor of its own in the file.
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


class FrozenTensors:
    """Tensors of a folder in Hugging Face's layout, by state-dict key, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            self._files = {key: folder / Path(file).name for key, file in shards.items()}
        elif (folder / "model.safetensors").is_file():
            with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), folder / "model.safetensors")

    def __call__(self, key: str) -> Tensor | None:
        """The tensor, or None if the backbone has none of that name."""
        if key not in self._files:
            key = _TIED.get(key, key)
        if key not in self._files:
            return None
        with safe_open(str(self._files[key]), framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


def same(uploaded: Tensor, own: Tensor) -> bool:
    """Equal as far as the coarser of the two dtypes can tell."""
    coarse = uploaded.dtype if uploaded.element_size() < own.element_size() else own.dtype
    return uploaded.shape == own.shape and torch.equal(uploaded.to(coarse), own.to(coarse))
