"""What is stored of a tuning job: plain data, JSON all the way."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from server.store.delta_fields import DeltaFields
from server.store.keys import Keys
from server.types import JobState

STATES: tuple[JobState, ...] = (
    "validating_files",
    "queued",
    "running",
    "paused",
    "succeeded",
    "failed",
    "cancelled",
)
CHECKPOINT = "ft:"
_CHECKPOINT = re.compile(rf"{CHECKPOINT}.*:(?P<job>ftjob-[0-9a-f]{{24}}):step-(?P<step>0|[1-9][0-9]{{0,9}})")
ENDED: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled"})


class JobFields(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job from the beginning. ``model`` is what it was asked to tune, as the request names it;
    ``name`` the delta that it makes; ``delta`` and ``hyperparameters`` are shown as they were given."""

    model: str
    backbone: str
    name: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int = 0
    metadata: dict[str, str] = {}
    hyperparameters: dict[str, Any] = {}
    delta: dict[str, Any] = {}
    created_at: int


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job has come. ``deaths``: of the tuner, in a row, since the newest checkpoint (of step ``checkpoint``)."""

    step: int = 0
    steps: int | None = None
    epoch: float = 0.0
    trained_tokens: int = 0
    seconds: float = 0.0
    checkpoint: int = 0
    deaths: int = 0
    estimated_finish: int | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. ``number`` counts from 1; it is given by the store."""

    level: Literal["info", "warn", "error"] = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = {}
    created_at: int
    number: int = 0


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A job's delta as it was at ``step``. ``file`` is relative to the job's folder and in native format; ``fields`` are
    those of the delta."""

    step: int
    file: str
    fields: DeltaFields
    metrics: dict[str, float] = {}
    created_at: int


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is now. ``spec`` is the ``JobSpec``'s JSON, None until the job's files are validated;
    ``fine_tuned_model`` the published delta's name.
    """

    id: str
    tenant: str
    status: JobState
    fields: JobFields
    progress: Progress = Progress()
    spec: bytes | None = None
    pausing: bool = False
    error: JobError | None = None
    fine_tuned_model: str | None = None
    result_files: list[str] = []
    finished_at: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ENDED


def checkpoint_model(job: str, fields: JobFields, step: int) -> str:
    """The name by which requests use a checkpoint."""
    return f"{CHECKPOINT}{fields.backbone}:{fields.name}:{job}:step-{step}"


def parse_checkpoint_model(model: str) -> tuple[str, int] | None:
    """The job and the step of such a name; None when it is none."""
    match = _CHECKPOINT.fullmatch(model)
    return None if match is None else (match["job"], int(match["step"]))


class Lease(msgspec.Struct, frozen=True):
    """The right to work on a job, until somebody else gets it: ``token`` is the fencing token."""

    job: str
    tenant: str
    token: int


class Claimed(msgspec.Struct, frozen=True):
    """A job that a worker has got. ``taken_over``: from one whose lease ran out."""

    lease: Lease
    record: JobRecord
    taken_over: bool


class StaleLease(Exception):
    """The job is no longer this worker's: it was cancelled, deleted, or taken over. Nothing was written."""


class JobEnding(msgspec.Struct, frozen=True, kw_only=True):
    """How a job succeeds, written in one go with the version that it made."""

    lease: Lease
    progress: Progress
    result_files: list[str]
    event: Event

    def parts(self, keys: Keys) -> tuple[list[str], list[str | int | bytes]]:
        """Keys and arguments, as ``delta_add.lua`` takes them after its own."""
        lease = self.lease
        arguments: list[str | int | bytes] = [
            lease.job,
            lease.tenant,
            lease.token,
            self.event.created_at,
            msgspec.json.encode(self.progress),
            msgspec.json.encode(self.result_files),
            msgspec.json.encode(self.event),
        ]
        return keys.of_job(lease.tenant, lease.job), arguments
