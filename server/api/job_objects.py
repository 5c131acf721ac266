"""Tuning jobs, their events and checkpoints as the API shows them: OpenAI's objects, and what this server adds."""

from __future__ import annotations

from typing import Any

from server.errors import InvalidRequest
from server.store.job_records import Checkpoint, Event, JobRecord, checkpoint_model


def job_object(job: JobRecord) -> dict[str, Any]:
    """The ``fine_tuning.job`` object. ``delta`` and ``progress`` are this server's own."""
    fields, progress = job.fields, job.progress
    error = job.error
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": fields.created_at,
        "finished_at": job.finished_at,
        "status": job.status,
        "model": fields.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "training_file": fields.training_file,
        "validation_file": fields.validation_file,
        "result_files": job.result_files,
        "trained_tokens": progress.trained_tokens if job.ended else None,
        "estimated_finish": progress.estimated_finish if job.status == "running" else None,
        "error": None
        if error is None
        else {"code": error.code, "message": error.message, "param": error.param},
        "hyperparameters": fields.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": fields.hyperparameters}},
        "seed": fields.seed,
        "metadata": fields.metadata,
        "integrations": [],
        "user_provided_suffix": fields.suffix,
        "delta": fields.delta,
        "progress": {
            "step": progress.step,
            "steps": progress.steps,
            "epoch": progress.epoch,
            "tokens": progress.trained_tokens,
            "pausing": job.pausing,
        },
    }


def event_object(job: str, event: Event) -> dict[str, Any]:
    """The ``fine_tuning.job.event`` object."""
    return {
        "id": event_id(job, event.number),
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_object(job: JobRecord, checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``fine_tuning.job.checkpoint`` object."""
    metrics = dict(checkpoint.metrics)
    if "valid_loss" in metrics:
        metrics["full_valid_loss"] = metrics["valid_loss"]
    return {
        "id": f"ftckpt-{job.id.removeprefix('ftjob-')}-{checkpoint.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint_model(job.id, job.fields, checkpoint.step),
        "fine_tuning_job_id": job.id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **metrics},
    }


def event_id(job: str, number: int) -> str:
    """An event's id: its job's and its number."""
    return f"ftevent-{job.removeprefix('ftjob-')}-{number}"


def event_number(job: str, text: str, param: str) -> int:
    """The number of the event with this id. Raises InvalidRequest for one of another job, or none."""
    digits = text.removeprefix(event_id(job, 0)[:-1])
    if digits == text or not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise InvalidRequest(f"Invalid '{param}': not the id of an event of this job.", param=param)
    return int(digits)
