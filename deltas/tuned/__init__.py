"""The methods that jobs can train, by name. Each has a stored form in :data:`deltas.methods.METHODS`."""

from __future__ import annotations

from collections.abc import Mapping

from deltas.errors import InvalidDelta
from deltas.tunable import Tunable
from deltas.tuned.adapters import PRESETS, BottleneckTuning, CompacterTuning
from deltas.tuned.base import Trained
from deltas.tuned.head import HeadTuning
from deltas.tuned.intrinsic import IntrinsicTuning
from deltas.tuned.lora import LoraTuning
from deltas.tuned.modules import LastLayerTuning, ModuleTuning
from deltas.tuned.prompts import PrefixTuning, PromptTuning
from deltas.tuned.sparse import DiffPruningTuning, MaskingTuning
from deltas.tuned.targets import before_head
from deltas.tuned.vectors import BitFitTuning, IA3Tuning, NormTuning

_ALL: tuple[Trained, ...] = (
    LoraTuning(),
    BottleneckTuning(),
    *PRESETS,
    CompacterTuning(),
    BitFitTuning(),
    PromptTuning(),
    PrefixTuning(),
    IA3Tuning(),
    NormTuning(),
    DiffPruningTuning(),
    MaskingTuning(),
    IntrinsicTuning(),
    LastLayerTuning(),
    ModuleTuning(),
    HeadTuning(),
)

TUNABLE: Mapping[str, Trained] = {tunable.name: tunable for tunable in _ALL}
"""By name, the presets among them; :data:`ALIASES` are other names of these."""

ALIASES: Mapping[str, str] = {
    "adapter": "bottleneck",
    "houlsby": "double_seq_bn",
    "pfeiffer": "seq_bn",
    "parallel": "par_bn",
    "bias": "bitfit",
    "prompt_tuning": "prompt",
    "prefix_tuning": "prefix",
    "layer_norm": "ln",
    "head_only": "head",
    "selective": "selective_module",
    "intrinsic_dimension": "intrinsic",
}


def tunable(name: str) -> Tunable:
    """The method of that name or alias. Raises :class:`~deltas.errors.InvalidDelta`, listing what can be trained."""
    found = TUNABLE.get(ALIASES.get(name, name))
    if found is None:
        raise InvalidDelta(
            f"method {ascii(name)[:200]} cannot be trained; what can: {', '.join(sorted(TUNABLE))}",
            field="method",
        )
    return found


__all__ = ["ALIASES", "TUNABLE", "before_head", "tunable"]
