"""The backbone's own tensors, from its folder: what an upload that repeats some of them is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

Frozen = Callable[[str], Tensor | None]
"""The backbone's tensor of that state-dict key, if it has one."""

# A tied head has no tensor of its own in the file.
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


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
