"""Model names: which delta or sum of deltas, if any, a request's ``model`` means for its tenant."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import msgspec

from server.api.composition import Term, is_sum, parse_sum
from server.api.services import Backbone, Services
from server.errors import InvalidRequest, ModelNotFound, NotFound, Quarantined
from server.store.job_records import CHECKPOINT, checkpoint_model, parse_checkpoint_model
from server.store.reference import shown
from server.types import DeltaPart, DeltaRecord, DeltaRef, Principal


@dataclass(frozen=True)
class Target:
    """What serves a request: the backbone alone (no ``records``), with one delta, or with the sum of several.

    ``records`` are the sum's terms in their order; a single delta is the only one.
    """

    model: str
    records: tuple[DeltaRecord, ...] = ()
    delta: DeltaRef | None = None

    @property
    def headers(self) -> dict[str, str]:
        """``x-delta-digest``, where a delta or a sum serves."""
        return {} if self.delta is None else {"x-delta-digest": self.delta.digest}


async def resolve(services: Services, backbone: Backbone, caller: Principal, model: str) -> Target:
    """What ``model`` means. Raises ``ModelNotFound``, ``Quarantined`` and, for what is no sum, ``InvalidRequest``.

    Whether deltas have a sum shows when the engine first adds them up: ``InvalidComposition``.
    """
    if model == backbone.info.name:
        return Target(model)
    if model.startswith(CHECKPOINT):
        return await _checkpoint(services, caller, model)
    terms = parse_sum(model) if is_sum(model) else [Term(model)]
    for term in terms:
        if term.reference == backbone.info.name:
            raise InvalidRequest(
                f"'{term.reference}' is the backbone, which is in every sum already: leave the term out.",
                param="model",
            )
    found = await asyncio.gather(
        *(_record(services, caller, term.reference) for term in terms), return_exceptions=True
    )
    records: list[DeltaRecord] = []
    for record in found:  # in the terms' order, so that the same request gets the same error
        if isinstance(record, BaseException):
            raise record
        records.append(record)
    parts = [
        DeltaPart(record.digest, str(services.blobs.path(record.digest)), term.weight)
        for term, record in zip(terms, records, strict=True)
    ]
    alone = len(parts) == 1 and parts[0].weight == 1
    ref = DeltaRef(parts[0].digest, parts[0].path) if alone else DeltaRef.of_sum(parts)
    return Target(model, tuple(records), ref)


async def _checkpoint(services: Services, caller: Principal, model: str) -> Target:
    """A checkpoint of the caller's own tuning job, by the name that its object has."""
    parsed = parse_checkpoint_model(model)
    found = None
    if parsed is not None:
        job, step = parsed
        with contextlib.suppress(NotFound):
            known = await services.jobs.get(caller.tenant, job)
            if model == checkpoint_model(job, known.fields, step):
                found = await services.jobs.checkpoint(job, step)
    if parsed is None or found is None:
        raise ModelNotFound(f"the model {shown(model)} does not exist", param="model")
    record = DeltaRecord(
        id=model, tenant=caller.tenant, name=model, version=found.step, **msgspec.structs.asdict(found.fields)
    )
    file = services.job_folder(parsed[0]) / found.file
    return Target(model, (record,), DeltaRef(record.digest, str(file)))


async def _record(services: Services, caller: Principal, reference: str) -> DeltaRecord:
    record = await services.registry.resolve(caller.tenant, reference)
    if record.status == "quarantined":
        raise Quarantined(f"The delta '{reference}' is quarantined: {record.status_reason}.")
    return record
