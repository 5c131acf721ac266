"""What a configuration may not say of positions and attention, where rows of many lengths share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from deltas.errors import UnsupportedBackbone


def check_positions(config: PretrainedConfig) -> None:
    """Refuses what transformers decides by the longest row of a batch, and attention that looks ahead.

    Raises :class:`UnsupportedBackbone`, ``field`` naming the option.
    """
    if "longrope" in _types(getattr(config, "rope_parameters", None) or {}):
        raise UnsupportedBackbone(
            "rope_type 'longrope' is not supported: a row's positions would depend on the longest row of its batch",
            field="rope_parameters",
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedBackbone(
            "use_bidirectional_attention is set: only causal attention is supported",
            field="use_bidirectional_attention",
        )


def _types(parameters: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of rotary positions: one, or one for each kind of layer."""
    for key, value in parameters.items():
        if key == "rope_type":
            yield str(value)
        elif isinstance(value, Mapping):
            yield from _types(value)
