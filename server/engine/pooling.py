"""How a row's hidden states become one vector: as sentence-transformers configures it, in the backbone's folder.

``modules.json`` lists a Transformer, a Pooling and perhaps a Normalize; each has its own folder. A backbone without them
is pooled by the mean, without normalising. (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.errors import InvalidRequest

MODES = ("cls", "mean", "max")
# Older configs have a flag for each mode; the vectors are joined in this order.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Embedder:
    """``modes`` are joined in the library's order; ``longest`` is the number of tokens it was made for, if known."""

    modes: tuple[str, ...] = ("mean",)
    normalise: bool = False
    longest: int | None = None

    def but(self, mode: str | None, normalise: bool | None) -> Embedder:
        """This one with another pooling (one of ``MODES``) or normalisation; None leaves what it has."""
        if mode is None and normalise is None:
            return self
        modes = self.modes if mode is None else (mode,)
        return Embedder(modes, self.normalise if normalise is None else normalise, self.longest)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[tokens, width]`` of one row, prompt tokens included -> float32 ``[width * modes]``."""
        states = hidden.float()
        parts = [
            states[0] if mode == "cls" else states.mean(0) if mode == "mean" else states.amax(0)
            for mode in self.modes
        ]
        vector = torch.cat(parts)
        return torch.nn.functional.normalize(vector, dim=0) if self.normalise else vector


def read_embedder(folder: Path) -> Embedder:
    """What the folder says. Raises :class:`InvalidRequest` for modules that would change embeddings and are not served."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return Embedder(longest=_longest(folder))
    sentence = _json(folder / "sentence_bert_config.json")
    if sentence.get("do_lower_case"):
        raise _refused("do_lower_case is set, which is the tokenizer's work")
    found = Embedder(longest=_longest(folder))
    for module in json.loads(modules.read_text()):
        kind = str(module.get("type")).rpartition(".")[2]
        match kind:
            case "Transformer":
                continue
            case "Pooling":
                found = Embedder(
                    _modes(_json(folder / module["path"] / "config.json")), found.normalise, found.longest
                )
            case "Normalize":
                found = Embedder(found.modes, True, found.longest)
            case _:
                raise _refused(f"modules.json has a {kind}; served: Transformer, Pooling, Normalize")
    return found


def _modes(config: dict[str, Any]) -> tuple[str, ...]:
    given = config.get("pooling_mode")
    if given is None:
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    else:
        modes = [given] if isinstance(given, str) else list(given)
    unknown = [str(mode) for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise _refused(f"its pooling is {', '.join(unknown) or 'none'}; served: {', '.join(MODES)}")
    return tuple(modes)


def _longest(folder: Path) -> int | None:
    found = _json(folder / "sentence_bert_config.json").get("max_seq_length")
    return found if isinstance(found, int) and found > 0 else None


def _json(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text()) if path.is_file() else {}
    return config if isinstance(config, dict) else {}


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the backbone's sentence-transformers files are not served: {why}", param="backbone"
    )
