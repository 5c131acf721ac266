"""PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

The tensors say where a delta applies; ``target_modules`` is only compared with them. Every key of the library's
configuration classes has an entry in a table (``keys``): None for what changes nothing in evaluation, else a check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import DeltaFiles
from deltas.formats.header import shown
from deltas.formats.peft import low_rank, prompts, transforms, weights
from deltas.formats.peft.heads import read_head
from deltas.formats.peft.keys import Keys, tuner
from deltas.formats.peft.lora import ADALORA_KEYS, LORA_KEYS, adalora, lora
from deltas.formats.peft.prompts import PROMPT_KEYS
from deltas.formats.peft.reading import CONFIG, Reading
from deltas.formats.peft.saved import read_saved, trainable_tokens
from deltas.formats.peft.targets import demand_targets
from deltas.formats.plan import Plan, check_config, provenance
from deltas.sites import BackboneSpec

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class _Type:
    """One PEFT type: its config's keys, and what reads its tensors."""

    keys: Keys
    read: Callable[[Reading], None]
    prompt: bool = False


TYPES: Mapping[str, _Type] = {
    "ADALORA": _Type(ADALORA_KEYS, adalora),
    "BEFT": _Type(transforms.BEFT_KEYS, transforms.beft),
    "BOFT": _Type(transforms.BOFT_KEYS, transforms.boft),
    "C3A": _Type(weights.C3A_KEYS, weights.c3a),
    "CARTRIDGE": _Type(prompts.CARTRIDGE_KEYS, prompts.prefix, prompt=True),
    "CPT": _Type(prompts.CPT_KEYS, prompts.prompt, prompt=True),
    "DEFT": _Type(low_rank.DEFT_KEYS, low_rank.deft),
    "DELORA": _Type(low_rank.DELORA_KEYS, low_rank.delora),
    "FOURIERFT": _Type(weights.FOURIERFT_KEYS, weights.fourierft),
    "GLORA": _Type(weights.GLORA_KEYS, weights.glora),
    "GRALORA": _Type(low_rank.GRALORA_KEYS, low_rank.gralora),
    "HIRA": _Type(weights.HIRA_KEYS, weights.hira),
    "HRA": _Type(transforms.HRA_KEYS, transforms.hra),
    "IA3": _Type(transforms.IA3_KEYS, transforms.ia3),
    "LN_TUNING": _Type(transforms.LN_TUNING_KEYS, transforms.ln_tuning),
    "LOHA": _Type(weights.LOHA_KEYS, weights.loha),
    "LOKR": _Type(weights.LOKR_KEYS, weights.lokr),
    "LORA": _Type(LORA_KEYS, lora),
    "MISS": _Type(low_rank.MISS_KEYS, low_rank.miss),
    "OFT": _Type(transforms.OFT_KEYS, transforms.oft),
    "PEANUT": _Type(weights.PEANUT_KEYS, weights.peanut),
    "PREFIX_TUNING": _Type(prompts.PREFIX_KEYS, prompts.prefix, prompt=True),
    "PROMPT_TUNING": _Type(PROMPT_KEYS, prompts.prompt, prompt=True),
    "PVERA": _Type(low_rank.PVERA_KEYS, low_rank.pvera),
    "P_TUNING": _Type(prompts.P_TUNING_KEYS, prompts.prompt, prompt=True),
    "RANDLORA": _Type(weights.RANDLORA_KEYS, weights.randlora),
    "ROAD": _Type(transforms.ROAD_KEYS, transforms.road),
    "SHIRA": _Type(weights.SHIRA_KEYS, weights.shira),
    "SUPERTUNING": _Type(weights.SUPERTUNING_KEYS, weights.supertuning),
    "TINYLORA": _Type(low_rank.TINYLORA_KEYS, low_rank.tinylora),
    "TRAINABLE_TOKENS": _Type(tuner("token_indices"), trainable_tokens),
    "UNILORA": _Type(low_rank.UNILORA_KEYS, low_rank.unilora),
    "VBLORA": _Type(low_rank.VBLORA_KEYS, low_rank.vblora),
    "VERA": _Type(low_rank.VERA_KEYS, low_rank.vera),
    "WAVEFT": _Type(weights.WAVEFT_KEYS, weights.waveft),
}

_DECOMPOSED = "derived from a decomposition of every weight, which would be made again at every load"

REFUSED: Mapping[str, str] = {
    "ADAMSS": _DECOMPOSED,
    "ADAPTION_PROMPT": "it attends a second time in every layer, with a gate of its own",
    "FROD": _DECOMPOSED,
    "LILY": "not row-local: its router averages over every token of a batch",
    "MULTITASK_PROMPT_TUNING": "it needs a task's number with every request",
    "OSF": _DECOMPOSED,
    "POLY": "it needs a task's number with every request",
    "PSOFT": _DECOMPOSED,
    "SHADOW": "not row-local: it runs a second model beside the first",
    "XLORA": "not row-local: a classifier mixes other deltas, which its config names by path",
}
"""The library's other types, and why each is not served."""


def plan(files: DeltaFiles, spec: BackboneSpec) -> Plan:
    """What to load. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the key or tensor."""
    config = files.json(CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in TYPES:
        why = f": {REFUSED[kind]}" if isinstance(kind, str) and kind in REFUSED else ""
        raise UnsupportedDelta(
            f"PEFT's {shown(kind)} is not served{why}; served: {', '.join(TYPES)}", field="peft_type"
        )
    if WEIGHTS in files and PICKLED in files:
        raise InvalidDelta(f"send {WEIGHTS} or {PICKLED}, not both", field=PICKLED)
    file = PICKLED if PICKLED in files else WEIGHTS
    served = TYPES[kind]
    check_config(config, served.keys, CONFIG)
    reading = Reading(config, files.header(file), file, spec)
    if served.prompt:
        prompts.refuse_saved(reading)
    served.read(reading)
    if not served.prompt:
        read_saved(reading)
        demand_targets(reading)
    read_head(reading)
    reading.refuse_left()
    return Plan(
        "peft",
        file,
        tuple(reading.components),
        provenance(config, ("base_model_name_or_path", "peft_version")),
        reading.copies,
        reading.repeats,
        frozenset(reading.spare),
    )


__all__ = ["CONFIG", "LORA_KEYS", "PICKLED", "PROMPT_KEYS", "REFUSED", "TYPES", "WEIGHTS", "plan"]
