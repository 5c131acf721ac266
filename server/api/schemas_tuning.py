"""Bodies of ``/v1/fine_tuning/jobs``: OpenAI's, and what ``delta`` adds. Strict, as in ``schemas.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from server.api.schemas import Strict
from server.api.schemas_tasks import MAX_LABELS, AnyTemplate, Label, stored_template
from server.tuning.spec import Precision, Schedule, Task

MAX_METHODS = 8
MAX_TARGETS = 4096
MAX_METADATA = 16

Auto = Literal["auto"]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Share = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]


class Hyperparameters(Strict):
    """OpenAI's. ``auto`` is this server's default."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] | Auto | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Auto | None = None


class Supervised(Strict):
    """The settings of supervised tuning."""

    hyperparameters: Hyperparameters | None = None


class Method(Strict):
    """OpenAI's choice of a way to tune. Only supervised tuning is built."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class MethodEntry(Strict):
    """One of the methods that train together. What is not named here is an option of the method itself."""

    model_config = ConfigDict(extra="allow", strict=True)

    method: Annotated[str, Field(min_length=1, max_length=64)]
    targets: Annotated[list[Name], Field(min_length=1, max_length=MAX_TARGETS)] | None = None

    def options(self) -> dict[str, Any]:
        """The method's own options, as they were given."""
        return dict(self.__pydantic_extra__ or {})


class InitFromEntry(Strict):
    """An earlier delta to begin with. ``frozen`` None: frozen beside ``methods``, continued without any."""

    model: Name
    frozen: bool | None = None


class EarlyStoppingEntry(Strict):
    """See ``server.tuning.spec.EarlyStopping``."""

    patience: Annotated[int, Field(ge=1, le=10_000)]
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class DeltaEntry(Strict):
    """What this server adds to OpenAI's body. The fields are those of ``server.tuning.spec.JobSpec``."""

    name: Name | None = None
    task: Task | None = None
    methods: Annotated[list[MethodEntry], Field(min_length=1, max_length=MAX_METHODS)] | None = None
    init_from: InitFromEntry | None = None
    template: AnyTemplate | None = None
    labels: Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS)] | None = None
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    accumulation: Annotated[int, Field(ge=1, le=1024)] | None = None
    schedule: Schedule | None = None
    warmup: Share | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Share | None = None
    class_weights: Annotated[list[Annotated[float, Field(ge=0)]], Field(max_length=MAX_LABELS)] | None = None
    precision: Precision | None = None
    metric: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    evaluate_every: Steps | None = None
    checkpoint_every: Steps | None = None
    early_stopping: EarlyStoppingEntry | None = None

    @field_validator("init_from", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("labels")
    @classmethod
    def _distinct(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a label is there twice")
        return value

    def stored_template(self) -> str | list[str | dict[str, str]] | None:
        """As templates are stored."""
        return stored_template(self.template)


class JobRequest(Strict):
    """``POST /v1/fine_tuning/jobs``. ``dry_run``: check everything and say what it would take, and make nothing."""

    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    delta: DeltaEntry | None = None
    dry_run: bool | None = None

    @field_validator("metadata")
    @classmethod
    def _few(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and len(value) > MAX_METADATA:
            raise ValueError(f"at most {MAX_METADATA} entries")
        return value

    @field_validator("integrations", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        if value:
            raise ValueError("no integrations are built; follow the job's events and read its result files")
        return value

    @model_validator(mode="after")
    def _once(self) -> JobRequest:
        if (
            self.hyperparameters is not None
            and self.method is not None
            and self.method.supervised is not None
        ):
            raise ValueError("'hyperparameters' and 'method' are both given: leave out the former")
        return self

    def chosen(self) -> Hyperparameters:
        """The hyperparameters, wherever they stand."""
        if self.method is not None and self.method.supervised is not None:
            return self.method.supervised.hyperparameters or Hyperparameters()
        return self.hyperparameters or Hyperparameters()
