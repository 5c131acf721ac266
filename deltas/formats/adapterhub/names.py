"""The names of AdapterHub's files."""

from __future__ import annotations

from deltas.errors import InvalidDelta
from deltas.formats.files import DeltaFiles

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
PICKLED = "pytorch_adapter.bin"
HEAD_CONFIG = "head_config.json"
HEAD = "model_head.safetensors"
PICKLED_HEAD = "pytorch_model_head.bin"
SETUP = "adapter_setup.json"
FUSION_CONFIG = "adapter_fusion_config.json"
FUSION = "model_adapter_fusion.safetensors"
PICKLED_FUSION = "pytorch_model_adapter_fusion.bin"

ADAPTER_FILES = frozenset({CONFIG, WEIGHTS, PICKLED})
HEAD_FILES = frozenset({HEAD_CONFIG, HEAD, PICKLED_HEAD})
FUSION_FILES = frozenset({FUSION_CONFIG, FUSION, PICKLED_FUSION})


def one_of_two(files: DeltaFiles, folder: str, safe: str, pickled: str) -> str:
    """Which of the two forms of a tensor file is there; ``folder`` is empty or ends in a slash."""
    safe, pickled = folder + safe, folder + pickled
    if safe in files and pickled in files:
        raise InvalidDelta(f"send {safe} or {pickled}, not both", field=pickled)
    return pickled if pickled in files else safe
