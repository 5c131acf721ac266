"""What one tuning job is, as it is stored, sent to the tuner and written beside its checkpoints: JSON all the way.

Everything here is decided when a job is accepted: defaults are filled in, names are resolved, so that the tuner needs
neither the registry nor a tokenizer, and a job that is resumed after a crash does exactly what it would have done.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Task = Literal["generate", "classify", "regress", "tag"]
Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "float32", "bfloat16"]


class MethodSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One component that is trained. ``options`` are the method's own, validated and complete (``deltas.tunable``)."""

    method: str
    options: dict[str, Any]
    targets: list[str]  # site names


class InitFrom(msgspec.Struct, frozen=True, kw_only=True):
    """An earlier delta that the job begins with: ``frozen`` keeps it as it is beside the new components."""

    name: str
    digest: str
    file: str  # native format, on this machine
    frozen: bool


class EarlyStopping(msgspec.Struct, frozen=True, kw_only=True):
    """Stop after ``patience`` evaluations without an improvement of more than ``min_delta``; keep the best."""

    patience: int
    min_delta: float = 0.0


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One job. ``learning_rate`` is the peak; None takes each method's own default, times ``learning_rate_multiplier``.

    ``batch_size`` rows a micro-batch, ``accumulation`` of them a step. ``warmup`` is a share of all steps.
    ``evaluate_every`` and ``checkpoint_every`` count steps; None is once an epoch. ``class_weights`` has one number a
    label, in their order. ``metric`` is the one that early stopping and the best checkpoint go by. ``ends`` are the
    tokens that end what is generated.
    """

    id: str
    tenant: str
    name: str
    task: Task
    methods: list[MethodSpec]
    init_from: InitFrom | None = None
    labels: list[str] | None = None
    seed: int = 0
    epochs: int = 3
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float | None = None
    learning_rate_multiplier: float = 1.0
    schedule: Schedule = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None
    precision: Precision = "auto"
    max_length: int = 512
    metric: str = "loss"
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    early_stopping: EarlyStopping | None = None
    ends: list[int] = []


class Example(msgspec.Struct, frozen=True, array_like=True):
    """One row of a dataset, ready for the backbone.

    ``tokens`` are what a decoder or an encoder reads, and the source of an encoder-decoder, whose ``target`` are the
    tokens to be generated, its end token included. ``learn`` are half-open ranges of a decoder's ``tokens`` that are
    to be predicted (those of completions; their end token included). ``label`` is a class's number, a value, or one
    class's number a token (-100: none counts). ``types`` are token types, empty for zeros.
    """

    tokens: list[int]
    target: list[int] = []
    learn: list[tuple[int, int]] = []
    label: int | float | list[int] | None = None
    types: list[int] = []
