"""The table of PEFT: every member of ``peft.PeftType``, in cases that we serve or refused with a reason.

A case is made, saved and evaluated by PEFT itself (``peft_reference``); ``test_peft_table`` holds our reading of the saved
files to PEFT's logits, and ``docs/methods.md`` is made of the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peft import (
    LilyConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OSFConfig,
    PeftConfig,
    PolyConfig,
    PsoftConfig,
    PveraConfig,
    WaveFTConfig,
)
from peft.tuners.lora.config import KasaConfig, LoraGAConfig

from tests.oracle.peft_cases_lora import LORA_CASES
from tests.oracle.peft_cases_other import OTHER_CASES
from tests.oracle.peft_cases_weights import WEIGHT_CASES
from tests.oracle.peft_reference import (
    FAMILIES,
    ROWS,
    Case,
    Family,
    Row,
    backbone_logits,
    cells,
    fresh_backbone,
    load_delta,
    logits,
    save_delta,
)

CASES: tuple[Case, ...] = LORA_CASES + WEIGHT_CASES + OTHER_CASES

_DECOMPOSED = "derived from a decomposition of every weight, which would be made again at every load"

REFUSED_TYPES: Mapping[str, str] = {
    "ADAMSS": _DECOMPOSED,
    "FROD": _DECOMPOSED,
    "MULTITASK_PROMPT_TUNING": "needs a task's number with every request",
    "OSF": _DECOMPOSED,
    "PSOFT": _DECOMPOSED,
    "ADAPTION_PROMPT": "attends a second time, with a gate of its own, in every layer",
    "LILY": "not row-local: its router averages over every token of the batch",
    "POLY": "needs a task's number with every request",
    "SHADOW": "not row-local: runs a second model beside the first",
    "XLORA": "not row-local: a classifier mixes other deltas, which its config names by path, by two forward passes",
}


@dataclass(frozen=True, slots=True)
class Refused:
    """A use of PEFT that we refuse, naming ``field``, a key of its config."""

    name: str
    make: Callable[[Family], PeftConfig]
    field: str
    reason: str
    families: tuple[str, ...] = ("llama",)


REFUSED: tuple[Refused, ...] = (
    Refused(
        "lily",
        lambda f: LilyConfig(task_type=f.task, r=2, stride_A=1, num_B=2, target_modules=list(f.query_value)),
        "peft_type",
        REFUSED_TYPES["LILY"],
    ),
    Refused(
        "poly",
        lambda f: PolyConfig(task_type=f.task, r=2, n_tasks=2, target_modules=list(f.query_value)),
        "peft_type",
        REFUSED_TYPES["POLY"],
    ),
    Refused(
        "alora",
        lambda f: LoraConfig(
            task_type=f.task, target_modules=list(f.query_value), alora_invocation_tokens=[3, 4]
        ),
        "alora_invocation_tokens",
        "applies only after the tokens that invoke it: needs a mask over the row",
    ),
    Refused(
        "layer_replication",
        lambda f: LoraConfig(
            task_type=f.task, target_modules=list(f.query_value), layer_replication=[[0, 2], [1, 2]]
        ),
        "layer_replication",
        "builds another, deeper backbone",
    ),
    Refused(
        "pissa_niter",
        lambda f: LoraConfig(
            task_type=f.task, target_modules=list(f.query_value), init_lora_weights="pissa_niter_4"
        ),
        "init_lora_weights",
        "takes random factors out of the weight, which the file does not hold",
    ),
    Refused(
        "lora_ga",
        lambda f: LoraConfig(
            task_type=f.task,
            target_modules=list(f.query_value),
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(),
        ),
        "init_lora_weights",
        "training took factors out of the weight that the file does not hold",
    ),
    Refused(
        "multitask_prompts",
        lambda f: MultitaskPromptTuningConfig(
            task_type=f.task, num_virtual_tokens=4, num_tasks=3, num_ranks=2
        ),
        "peft_type",
        REFUSED_TYPES["MULTITASK_PROMPT_TUNING"],
    ),
    Refused(
        "kasa",
        lambda f: LoraConfig(task_type=f.task, target_modules=list(f.query_value), kasa_config=KasaConfig()),
        "kasa_config",
        _DECOMPOSED,
    ),
    Refused(
        "psoft",
        lambda f: PsoftConfig(task_type=f.task, r=4, target_modules=list(f.query_value)),
        "peft_type",
        _DECOMPOSED,
    ),
    Refused(
        "osf",
        lambda f: OSFConfig(task_type=f.task, effective_rank=8, target_modules=list(f.query_value)),
        "peft_type",
        _DECOMPOSED,
    ),
    Refused(
        "waveft_daubechies",
        lambda f: WaveFTConfig(
            task_type=f.task, n_frequency=50, wavelet_family="db2", target_modules=list(f.query_value)
        ),
        "wavelet_family",
        "of the wavelets only Haar's is served",
    ),
    Refused(
        "pvera_sampled",
        lambda f: PveraConfig(
            task_type=f.task, target_modules=list(f.query_value), sample_at_inference=True, generator_seed=3
        ),
        "sample_at_inference",
        "its output is random",
    ),
)

__all__ = [
    "CASES",
    "FAMILIES",
    "REFUSED",
    "REFUSED_TYPES",
    "ROWS",
    "Case",
    "Family",
    "Refused",
    "Row",
    "backbone_logits",
    "cells",
    "fresh_backbone",
    "load_delta",
    "logits",
    "save_delta",
]
