"""What the api process and the tuner say to each other. Frames of msgpack over a socket pair, as with the engine."""

from __future__ import annotations

import msgspec

from server.tuning.spec import JobSpec


class Start(msgspec.Struct, frozen=True, tag=True):
    """Run a job whose encoded data lie in ``folder`` (``train.msgpack``, ``valid.msgpack``); go on from its newest
    checkpoint there, if it has one."""

    spec: JobSpec
    folder: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End a job after the step in progress; with a checkpoint if ``keep`` (a pause), without (cancelled) if not."""

    job: str
    keep: bool


class Load(msgspec.Struct, frozen=True, tag=True):
    """How many rows the engine runs and waits for: what a duty cycle follows."""

    rows: int


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Checkpoint every job and exit."""


class Begun(msgspec.Struct, frozen=True, tag=True):
    """A job trains. ``step`` is 0, or where its checkpoint left off; bytes are of the tuner process."""

    job: str
    step: int
    steps: int
    backbone_bytes: int
    private_bytes: int  # of the backbone's weights, not shared with the engine
    trainable: int
    process_bytes: int = 0  # what is the process's alone: Python, libraries' data, this and other jobs


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """An optimizer step. ``seconds`` is its share of the time; ``tokens`` of this step, its micro-batches together."""

    job: str
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float


class Evaluated(msgspec.Struct, frozen=True, tag=True):
    """The validation set at a step: ``metrics`` by name, ``loss`` among them. ``best``: better than all before."""

    job: str
    step: int
    metrics: dict[str, float]
    best: bool


class Checkpointed(msgspec.Struct, frozen=True, tag=True):
    """A checkpoint is on disk, durable: ``file`` is the delta (native format) as it was at ``step``."""

    job: str
    step: int
    file: str


class Finished(msgspec.Struct, frozen=True, tag=True):
    """Training ended: ``file`` is the delta to publish, of step ``best_step``. ``early``: stopped before its epochs."""

    job: str
    step: int
    best_step: int
    file: str
    early: bool
    tokens: int


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """As :class:`Stop` asked."""

    job: str
    step: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The job cannot go on, and trying again would not help."""

    job: str
    code: str
    message: str
    param: str | None = None


class TunerDied(msgspec.Struct, frozen=True, tag=True):
    """The tuner process is gone, and these jobs were not done; said by the client, not by the tuner."""

    jobs: list[str]
    reason: str


ToTuner = Start | Stop | Load | Leave
FromTuner = Begun | Stepped | Evaluated | Checkpointed | Finished | Stopped | Failed
