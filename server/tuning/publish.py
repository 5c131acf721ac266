"""From a trained delta's file to a served delta: judged as an upload is, stored, and registered with its job's success.

A crash between any two steps leaves the job running and nothing visible; whoever takes it over publishes again, and the
same content has the same digest. The version and the job's success are one Lua script (``delta_add.lua``): there are
both or neither.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deltas.formats import native
from server.metrics import Metrics
from server.store.acceptance import Prober, accept
from server.store.delta_fields import fields_of
from server.store.deltas import DeltaStore
from server.store.files import FileStore
from server.store.job_records import Event, JobEnding, JobRecord, Lease, Progress

RESULTS = "step_metrics.csv"


@dataclass(frozen=True)
class Publisher:
    """What publishing needs of the server."""

    engine: Prober
    deltas: DeltaStore
    files: FileStore
    metrics: Metrics

    async def publish(
        self, lease: Lease, record: JobRecord, file: Path, progress: Progress, curves: str, now: int
    ) -> None:
        """Register the delta in ``file`` (native format) under the job's name, and the job as succeeded.

        Raises ``DeltaRefused`` for one that does not stand its first forward pass, ``StaleLease`` when the job is no
        longer this worker's, ``Unavailable`` while engine or Redis are away: then call it again.
        """
        delta = await asyncio.to_thread(native.load, file)
        await accept(self.engine, self.deltas.registry, self.metrics, delta, file)
        metadata = record.fields.metadata | {"fine_tuning_job": record.id}
        fields = await asyncio.to_thread(fields_of, delta, record.fields.backbone, metadata)
        results = await self.results(lease, curves)
        name = record.fields.name
        ending = JobEnding(
            lease=lease,
            progress=progress,
            result_files=[results],
            event=Event(
                message=f"The job has successfully completed; the model is {name}",
                data={"fine_tuned_model": name, "digest": delta.digest},
                created_at=now,
            ),
        )
        await self.deltas.add(lease.tenant, name, fields, file, ending=ending)

    async def results(self, lease: Lease, curves: str) -> str:
        """Keep the metrics as a file of the tenant; its id, which is always the same for a job."""
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
            file.write(curves)
            file.flush()
            kept = await self.files.add(
                lease.tenant, RESULTS, "fine-tune-results", Path(file.name), file_id=results_id(lease.job)
            )
        return kept.id


def results_id(job: str) -> str:
    """The id of a job's result file."""
    return f"file-{job.removeprefix('ftjob-'):0>32}"
