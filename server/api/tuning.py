"""What the routes of tuning jobs do: check, encode and queue; ask; forget."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from server.api import uploads
from server.api.schemas_tuning import DeltaEntry, JobRequest
from server.api.services import Backbone, Services
from server.engine.templates import Template
from server.errors import DatasetInvalid, InvalidRequest, ModelNotFound, Quarantined, Unavailable
from server.store.durable import make_folder
from server.store.files import FileRecord
from server.store.job_records import JobFields, JobRecord, Lease, StaleLease
from server.store.jobs import new_id
from server.store.reference import check_name
from server.tuning import estimate, folders, jobs, submit
from server.tuning.spec import EarlyStopping, InitFrom, JobSpec, MethodSpec, Task
from server.tuning.submit import Choices, MethodChoice, PreparedData
from server.types import DeltaRecord, Principal, TextPiece

_REPORT = "bad_rows.jsonl"
_PLAIN = (
    "learning_rate",
    "accumulation",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing",
    "class_weights",
    "precision",
    "metric",
    "evaluate_every",
    "checkpoint_every",
)


@dataclass(frozen=True)
class _Plan:
    """A request whose names are resolved, before its files are looked at."""

    backbone: Backbone
    name: str
    training: FileRecord
    validation: FileRecord | None
    template: Template | None
    methods: list[MethodSpec]
    choices: Choices
    fields: JobFields


async def create(services: Services, caller: Principal, body: JobRequest) -> JobRecord:
    """Validate and queue a job.

    Raises ``DatasetInvalid``, ``InvalidRequest``, ``NotFound``, ``LimitExceeded``; then no job is left.
    """
    _check_on(services)
    job = new_id()
    plan = await _plan(services, caller, body, job)
    limit = (await services.tenants.get(caller.tenant)).limits.get("jobs")
    most = None if limit is None else int(limit)
    lease = await services.jobs.create(caller.tenant, plan.fields, services.worker, most, job_id=job)
    folder = services.job_folder(job)
    try:
        async with _held(services, lease):
            await asyncio.to_thread(make_folder, folder)
            data = await _prepare(services, caller, plan, folder)
            if plan.choices.init_from is not None:
                source = services.blobs.path(plan.choices.init_from.digest)
                await asyncio.to_thread(shutil.copyfile, source, submit.init_file(folder))
            spec = _spec(plan, data, job, caller.tenant)
            await services.jobs.submit(lease, msgspec.json.encode(spec))
    except StaleLease:
        await asyncio.to_thread(folders.remove, folder)
        return await services.jobs.get(caller.tenant, job)  # cancelled meanwhile
    except BaseException:
        with contextlib.suppress(StaleLease, Unavailable):
            await asyncio.shield(services.jobs.discard(lease))
        await asyncio.shield(asyncio.to_thread(folders.remove, folder))
        raise
    _nudge(services)
    return await services.jobs.get(caller.tenant, job)


async def rehearse(services: Services, caller: Principal, body: JobRequest) -> dict[str, Any]:
    """Everything up to queueing: what the job would be."""
    _check_on(services)
    plan = await _plan(services, caller, body, new_id())
    async with uploads.upload_folder(services) as folder:
        data = await _prepare(services, caller, plan, folder)
    spec = _spec(plan, data, "", caller.tenant)
    trained = data.training.tokens * spec.epochs
    info = plan.backbone.info
    device: Literal["cpu", "cuda"] = "cpu" if info.device == "cpu" else "cuda"
    return {
        "object": "fine_tuning.job.dry_run",
        "model": plan.fields.model,
        "hyperparameters": plan.fields.hyperparameters,
        "delta": submit.shown(spec),
        "examples": data.training.examples,
        "validation_examples": 0 if data.validation is None else data.validation.examples,
        "tokens": data.training.tokens,
        "longest": data.training.longest,
        "trained_tokens": trained,
        "estimated_seconds": round(estimate.seconds(trained, info.parameters, device), 1),
        "steps": submit.steps(spec, data),
        "warnings": msgspec.to_builtins([*data.warnings]),
    }


async def ask(
    services: Services, tenant: str, job: str, what: Literal["cancel", "pause", "resume"]
) -> JobRecord:
    """Cancel, pause or resume. Raises ``NotFound``, ``Conflict``."""
    record = await services.jobs.ask(tenant, job, what)
    _nudge(services)
    if record.ended and services.tuning is not None:
        await services.tuning.tidy(tenant, job)
    return record


async def delete(services: Services, tenant: str, job: str) -> None:
    """Forget a job and its checkpoints. Raises ``NotFound``, ``Conflict``."""
    checkpoints = await _digests(services, tenant, job)
    await services.jobs.delete(tenant, job)
    for digest in checkpoints:
        if not await services.registry.referenced(digest):
            services.engine.drop(digest)
    await asyncio.to_thread(folders.remove, services.job_folder(job))


async def sweep(services: Services) -> None:
    """Remove what is left of jobs that are gone, as after their tenant."""
    await jobs.sweep(services.jobs, services.jobs_folder)
    _nudge(services)


async def _digests(services: Services, tenant: str, job: str) -> list[str]:
    await services.jobs.get(tenant, job)
    return [one.fields.digest for one in await services.jobs.checkpoints(job)]


async def _plan(services: Services, caller: Principal, body: JobRequest, job: str) -> _Plan:
    """Resolve every name. Raises ``InvalidRequest``, ``NotFound``."""
    backbone = services.accept_work()
    delta = body.delta or DeltaEntry()
    name = _name(body, delta, backbone, job)
    training = await _file(services, caller, body.training_file, "training_file")
    validation = (
        None
        if body.validation_file is None
        else await _file(services, caller, body.validation_file, "validation_file")
    )
    task = delta.task or submit.default_task(backbone.spec)
    submit.check_task(task, backbone.spec)
    init_from, earlier = await _init_from(services, caller, body, delta, backbone, job, task)
    head = None if earlier is None or earlier.task_kind is None else earlier
    entries = [MethodChoice(one.method, one.options(), one.targets) for one in delta.methods or ()]
    if not entries:  # an earlier delta is trained on by its own methods
        names = [submit.DEFAULT_METHOD] if earlier is None else [*earlier.methods]
        entries = [MethodChoice(name, {}, None) for name in names]
    methods = submit.method_specs(entries, backbone.spec, task, partial(_plain_tokens, backbone))
    given = body.chosen()
    choices = Choices(
        task=task,
        methods=entries,
        init_from=init_from,
        labels=delta.labels or (None if head is None else head.labels),
        headed=head is not None and init_from is not None and init_from.frozen,
        seed=body.seed or 0,
        epochs=_or(given.n_epochs, submit.DEFAULT_EPOCHS),
        batch_size=_or(given.batch_size, submit.DEFAULT_BATCH[task]),
        max_length=min(delta.max_length or submit.DEFAULT_MAX_LENGTH, backbone.info.max_model_len),
        multiplier=float(_or(given.learning_rate_multiplier, 1.0)),
        early_stopping=None
        if delta.early_stopping is None
        else EarlyStopping(**delta.early_stopping.model_dump()),
        more={field: value for field in _PLAIN if (value := getattr(delta, field)) is not None},
        ends=backbone.tokenizer.eos_token_ids,
    )
    submit.check_choices(choices, backbone.info.dtype, validated=validation is not None)
    stored = delta.stored_template()
    fields = JobFields(
        model=body.model,
        backbone=backbone.info.name,
        name=name,
        training_file=training.id,
        validation_file=None if validation is None else validation.id,
        suffix=body.suffix,
        seed=choices.seed,
        metadata=body.metadata or {},
        hyperparameters={
            "n_epochs": choices.epochs,
            "batch_size": choices.batch_size,
            "learning_rate_multiplier": choices.multiplier,
        },
        delta=delta.model_dump(exclude_none=True) | {"name": name, "task": task},
        created_at=int(time.time()),
    )
    template = None if stored is None else Template.of(stored)
    return _Plan(backbone, name, training, validation, template, methods, choices, fields)


async def _prepare(services: Services, caller: Principal, plan: _Plan, folder: Path) -> PreparedData:
    """Encode the files into ``folder``. Raises ``DatasetInvalid``, whose report is kept as a file of the tenant."""
    choices, info = plan.choices, plan.backbone.info

    def work() -> PreparedData:
        return services.prepare(
            services.files.path(plan.training),
            None if plan.validation is None else services.files.path(plan.validation),
            kind=plan.backbone.spec.kind,
            task=choices.task,
            template=plan.template,
            labels=choices.labels,
            max_length=choices.max_length,
            tokenizer=plan.backbone.tokenizer,
            folder=folder,
            positions=info.max_model_len,
        )

    try:
        async with services.preparing:
            return await asyncio.to_thread(work)
    except DatasetInvalid as error:
        if error.report is not None:
            kept = await services.files.add(caller.tenant, _REPORT, "fine-tune-results", error.report)
            error.report_file = kept.id
        raise


def _spec(plan: _Plan, data: PreparedData, job: str, tenant: str) -> JobSpec:
    choices = plan.choices
    methods = plan.methods
    if not choices.headed:
        methods = submit.with_head(
            plan.methods, choices.methods, plan.backbone.spec, choices.task, data.labels
        )
    return submit.job_spec(job, tenant, plan.name, choices, methods, data)


async def _init_from(
    services: Services,
    caller: Principal,
    body: JobRequest,
    delta: DeltaEntry,
    backbone: Backbone,
    job: str,
    task: Task,
) -> tuple[InitFrom | None, DeltaRecord | None]:
    """The delta to begin with, and its record: ``delta.init_from``, or a ``model`` that is one."""
    reference, param, frozen = body.model, "model", None
    if body.model == backbone.info.name:
        if delta.init_from is None:
            return None, None
        reference, param, frozen = delta.init_from.model, "delta.init_from", delta.init_from.frozen
    elif delta.init_from is not None:
        raise InvalidRequest(
            f"'model' names a delta to begin with, and 'delta.init_from' another: let 'model' be {backbone.info.name!r}.",
            param="delta.init_from",
        )
    try:
        record = await services.registry.resolve(caller.tenant, reference)
    except ModelNotFound as error:
        raise ModelNotFound(error.message, param=param) from error
    if record.status == "quarantined":
        raise Quarantined(f"The delta '{reference}' is quarantined: {record.status_reason}.", param=param)
    if record.task_kind not in (None, task):
        raise InvalidRequest(
            f"'{reference}' brings a head to {record.task_kind}, and the job is to {task}", param=param
        )
    found = InitFrom(
        name=f"{record.tenant}/{record.id}" if record.tenant != caller.tenant else record.id,
        digest=record.digest,
        file=str(submit.init_file(services.job_folder(job))),
        frozen=bool(delta.methods) if frozen is None else frozen,
    )
    return found, record


async def _file(services: Services, caller: Principal, file_id: str, param: str) -> FileRecord:
    record = await services.files.get(caller.tenant, file_id, param)
    if record.purpose != "fine-tune":
        raise InvalidRequest(
            f"the file {file_id} has the purpose '{record.purpose}': upload it with 'fine-tune'", param=param
        )
    return record


def _name(body: JobRequest, delta: DeltaEntry, backbone: Backbone, job: str) -> str:
    """The delta's name: the given one, else the suffix, else the job's id."""
    param = "delta.name" if delta.name else "suffix"
    name = check_name(delta.name or body.suffix or job, param)
    if name == backbone.info.name:
        raise InvalidRequest(f"'{name}' is the backbone's name; a delta needs its own.", param=param)
    return name


def _plain_tokens(backbone: Backbone, text: str) -> list[int]:
    """A text's tokens; a control token that it spells is plain text."""
    return backbone.tokenizer.encode_pieces([[TextPiece(text, False)]], None, False).ids


def _or(value: Any, default: Any) -> Any:
    return default if value is None or value == "auto" else value


@contextlib.asynccontextmanager
async def _held(services: Services, lease: Lease) -> AsyncGenerator[None, None]:
    """Hold the lease of a job whose files are being validated."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(services.jobs.lease_seconds / 3)
            with contextlib.suppress(Unavailable):
                await services.jobs.renew(lease)

    task = asyncio.create_task(renew())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _check_on(services: Services) -> None:
    if services.settings.tuning == "off":
        raise InvalidRequest("this server was started with --tuning off", code="tuning_off")


def _nudge(services: Services) -> None:
    if services.tuning is not None:
        services.tuning.nudge()
