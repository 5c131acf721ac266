"""From what a request asks for to a job's spec: names resolved, options complete, defaults filled in.

Everything that needs the registry or a tokenizer happens here; the tuner gets the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from deltas.errors import DeltaError
from deltas.sites import BackboneSpec
from deltas.tuned import tunable
from deltas.tuned.prompts import with_init_tokens
from deltas.tuned.targets import before_head
from server.errors import InvalidRequest, UnsupportedTask
from server.tuning.scores import METRICS
from server.tuning.spec import EarlyStopping, InitFrom, JobSpec, MethodSpec, Task

HEADED: tuple[Task, ...] = ("classify", "regress", "tag")
DEFAULT_METHOD = "lora"
DEFAULT_MAX_LENGTH = 512
DEFAULT_EPOCHS = 3
DEFAULT_BATCH = {"generate": 8, "classify": 32, "regress": 32, "tag": 32}


class EncodedFile(Protocol):
    """What became of one file."""

    @property
    def examples(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def longest(self) -> int: ...


class PreparedData(Protocol):
    """What became of a job's files."""

    @property
    def labels(self) -> list[str] | None: ...

    @property
    def training(self) -> EncodedFile: ...

    @property
    def validation(self) -> EncodedFile | None: ...

    @property
    def warnings(self) -> Sequence[Any]: ...


Prepare = Callable[..., PreparedData]
"""``server.tuning.data.prepare``."""


@dataclass(frozen=True)
class MethodChoice:
    """A method as the request names it: its own options, and where it is put (None: the method's choice)."""

    method: str
    options: Mapping[str, Any]
    targets: Sequence[str] | None


@dataclass(frozen=True)
class Choices:
    """What a request decides about training. ``headed``: the delta that it begins with brings a head. ``more`` are fields
    of ``JobSpec`` that it names. ``ends``: the tokens that end what the backbone generates."""

    task: Task
    methods: Sequence[MethodChoice]
    init_from: InitFrom | None
    labels: list[str] | None
    headed: bool
    seed: int
    epochs: int
    batch_size: int
    max_length: int
    multiplier: float
    early_stopping: EarlyStopping | None
    more: Mapping[str, Any]
    ends: Sequence[int] = ()


def default_task(spec: BackboneSpec) -> Task:
    """What a backbone is tuned for if nobody says."""
    return "classify" if spec.kind == "encoder" else "generate"


def check_task(task: Task, spec: BackboneSpec) -> None:
    """Raises UnsupportedTask for a task that the backbone has no way to do."""
    if task == "generate" and spec.kind == "encoder":
        raise UnsupportedTask(
            f"an encoder ({spec.family}) does not generate text: tune it to classify, regress or tag",
            param="delta.task",
        )


def check_choices(choices: Choices, dtype: str, *, validated: bool) -> None:
    """Refuses a metric that the task does not have, what needs a validation file where none is given, and another
    precision than the resident backbone's ``dtype``. Raises InvalidRequest naming the field of the request."""
    if choices.more.get("precision", "auto") not in ("auto", dtype):
        raise InvalidRequest(
            f"the backbone is resident as {dtype}, and jobs compute as it does: 'precision' must be auto or {dtype}",
            param="delta.precision",
        )
    metric = choices.more.get("metric")
    if metric is not None and metric not in METRICS[choices.task]:
        raise InvalidRequest(
            f"'metric' must be one of {', '.join(METRICS[choices.task])} for a job that is to {choices.task}",
            param="delta.metric",
        )
    if validated:
        return
    given = {"early_stopping": choices.early_stopping, **choices.more}
    for field in ("early_stopping", "metric", "evaluate_every"):
        if given.get(field) is not None:
            raise InvalidRequest(f"'{field}' needs a 'validation_file'", param=f"delta.{field}")


def method_specs(
    methods: Sequence[MethodChoice],
    spec: BackboneSpec,
    task: Task,
    tokenize: Callable[[str], list[int]],
) -> list[MethodSpec]:
    """The methods with all their options and sites; a head among them is left for :func:`with_head`. ``tokenize`` is for
    what a prompt begins with.

    Raises InvalidRequest naming the field of the request.
    """
    found = []
    within = before_head(spec) if task in HEADED else spec
    for index, choice in enumerate(methods):
        where = f"delta.methods.{index}"
        if choice.method in ("head", "head_only"):
            if task not in HEADED:
                raise InvalidRequest(f"a head is of no use to '{task}'", param=f"{where}.method")
            continue
        try:
            method = tunable(choice.method)
            given = with_init_tokens(choice.options, tokenize) if method.name == "prompt" else choice.options
            options = method.options(given, spec)
            sites = method.sites(choice.targets, within)
        except DeltaError as error:
            raise InvalidRequest(f"Invalid '{where}': {error}", param=f"{where}.{error.field}") from error
        found.append(MethodSpec(method=method.name, options=options, targets=[site.name for site in sites]))
    return found


def with_head(
    found: list[MethodSpec],
    methods: Sequence[MethodChoice],
    spec: BackboneSpec,
    task: Task,
    labels: list[str] | None,
) -> list[MethodSpec]:
    """The same with a head for the task behind them, by the request's options or the usual ones."""
    if task not in HEADED:
        return found
    given = next((choice for choice in methods if choice.method in ("head", "head_only")), None)
    options = {} if given is None else dict(given.options)
    try:
        head = tunable("head")
        complete = head.options({**options, "kind": task, "labels": labels}, spec)
    except DeltaError as error:
        raise InvalidRequest(f"Invalid head: {error}", param=f"delta.methods.{error.field}") from error
    return [*found, MethodSpec(method="head", options=complete, targets=[])]


def job_spec(
    job: str, tenant: str, name: str, choices: Choices, methods: list[MethodSpec], data: PreparedData
) -> JobSpec:
    """The spec. Raises InvalidRequest for class weights that are not one a label."""
    weights = choices.more.get("class_weights")
    if weights is not None and len(weights) != len(data.labels or ()):
        raise InvalidRequest(
            f"'class_weights' needs one number for each label: {len(data.labels or [])}",
            param="delta.class_weights",
        )
    return JobSpec(
        id=job,
        tenant=tenant,
        name=name,
        task=choices.task,
        methods=methods,
        init_from=choices.init_from,
        labels=data.labels,
        seed=choices.seed,
        epochs=choices.epochs,
        batch_size=choices.batch_size,
        max_length=choices.max_length,
        learning_rate_multiplier=choices.multiplier,
        early_stopping=choices.early_stopping,
        ends=[*choices.ends],
        **choices.more,
    )


def steps(spec: JobSpec, data: PreparedData) -> int:
    """How many optimizer steps the job takes if nothing stops it early."""
    batches = -(-data.training.examples // spec.batch_size)
    return spec.epochs * -(-batches // spec.accumulation)


def shown(spec: JobSpec) -> dict[str, Any]:
    """What a job's object shows as ``delta``: the spec without what stands elsewhere in the object."""
    body: dict[str, Any] = msgspec.to_builtins(spec)
    for field in ("id", "tenant", "seed", "epochs", "batch_size", "learning_rate_multiplier", "ends"):
        del body[field]
    if spec.init_from is not None:
        body["init_from"] = {
            "model": spec.init_from.name,
            "digest": spec.init_from.digest,
            "frozen": spec.init_from.frozen,
        }
    return body


def init_file(folder: Path) -> Path:
    """Where a job keeps its own copy of the delta that it begins with: that version may be deleted meanwhile."""
    return folder / "init.safetensors"
