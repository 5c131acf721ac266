"""What the tests of jobs enter."""

from __future__ import annotations

from server.store.job_records import Checkpoint, Event, JobEnding, JobFields, Lease, Progress
from tests.unit.store.records import fields


def job_fields(name: str = "mine", **changes: object) -> JobFields:
    values: dict[str, object] = {
        "model": "tiny",
        "backbone": "tiny",
        "name": name,
        "training_file": "file-" + "0" * 32,
        "created_at": 1,
    }
    return JobFields(**(values | changes))  # type: ignore[arg-type]


def event(message: str) -> Event:
    return Event(message=message, created_at=1)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step, file=f"served/{step}", fields=fields(f"step {step}"), metrics={"x": 1.5}, created_at=1
    )


def ending(lease: Lease) -> JobEnding:
    return JobEnding(lease=lease, progress=Progress(step=9), result_files=["file-1"], event=event("done"))
