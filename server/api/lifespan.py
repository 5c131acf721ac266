"""From settings to running services, and back: what starts before the port opens, and what goes on behind
it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from deltas.errors import DeltaError
from server import logging
from server.api import placement
from server.api.services import Backbone, Services
from server.config import Settings
from server.engine.client import EngineClient
from server.engine.memory import create_shared
from server.errors import DeltaserveError
from server.metrics import Metrics
from server.store.blobs import FileBlobs
from server.store.connect import open_redis
from server.store.deltas import DeltaStore
from server.store.files import FileStore
from server.store.idempotency import IdempotencyStore
from server.store.jobs import JobStore
from server.store.keys import Keys
from server.store.registry import Registry
from server.store.tasks import TaskStore
from server.store.tenants import TenantStore
from server.store.valkey import EmbeddedValkey
from server.tenants.auth import Authenticator
from server.tenants.secrets import admin_key, server_secret
from server.tuning.client import opener
from server.tuning.data import prepare
from server.tuning.jobs import JobService, worker_name
from server.tuning.publish import Publisher
from server.tuning.tuner import OpenTuner
from server.tuning.worker import Tools
from server.types import BackboneInfo, EngineStats

log = logging.get("server.api")


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncGenerator[Services, None]:
    """Everything the app needs. The engine is still loading on entry; ``watch_engine`` sees it through.

    Raises ``OSError`` and the store's errors where the data folder or Redis cannot be used.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        valkey = await _embedded_valkey(settings, stack)
        redis = await open_redis(valkey.url if valkey else str(settings.redis_url))
        stack.push_async_callback(redis.aclose)
        keys = Keys()
        tenants = TenantStore(redis, keys, await asyncio.to_thread(server_secret, settings.data_dir))
        deltas = DeltaStore(Registry(redis, keys), FileBlobs(blob_folder(settings)))
        for digest in await deltas.start():
            log.info("unreferenced_blob_removed", digest=digest)
        jobs_folder = settings.data_dir / "jobs"
        files = FileStore(redis, keys, settings.data_dir / "files")
        await files.start()
        weights = _shared_memory(stack) if settings.tuning == "on" else None
        services = Services(
            settings=settings,
            deltas=deltas,
            tenants=tenants,
            tasks=TaskStore(redis, keys),
            files=files,
            jobs=JobStore(redis, keys),
            authenticator=Authenticator(tenants, settings.admin_key or admin_key(settings.data_dir)[0]),
            idempotency=IdempotencyStore(redis, keys),
            engine=EngineClient(settings, weights=weights),
            metrics=Metrics(),
            worker=await asyncio.to_thread(worker_name, jobs_folder),
            prepare=prepare,
        )
        await asyncio.to_thread(shutil.rmtree, services.upload_folder, ignore_errors=True)
        background = Background()
        stack.push_async_callback(background.stop)
        services.engine.on_stats = stats_handler(services, background)
        services.engine.on_ready = lambda: background.start(placement.restore(services))
        await services.engine.start()
        stack.push_async_callback(services.engine.stop)
        background.start(watch_engine(services))
        tuning = Background()
        stack.push_async_callback(tuning.stop)  # before the engine, which publishing needs
        if weights is not None:
            tuning.start(run_jobs(services, opener(weights)))
        if valkey is not None:
            background.start(keep_valkey(valkey, services))
        yield services


class Background:
    """Tasks beside the requests; their failures are logged, their ends awaited."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Cancel what still runs."""
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background_task_failed", exc_info=error)


async def watch_engine(services: Services) -> None:
    """Wait for the engine's first readiness and complete ``services``; note why if it never comes."""
    try:
        info = await services.engine.wait_ready()
        services.resident = await asyncio.to_thread(_describe, info)
    except (DeltaserveError, DeltaError) as error:
        services.state.fail(str(error))
        return
    except Exception as error:
        log.error("backbone_unusable", exc_info=error)
        services.state.fail(f"the backbone cannot be used: {error}")
        return
    log.info("ready", backbone=info.name, device=info.device, dtype=info.dtype)
    if services.on_ready is not None:
        services.on_ready(services.resident)


async def run_jobs(services: Services, open_tuner: OpenTuner) -> None:
    """Run tuning jobs from the moment the backbone is resident until this is cancelled; then they rest."""
    info = await services.engine.wait_ready()
    async with open_tuner(services.settings, info) as tuner:
        publisher = Publisher(services.engine, services.deltas, services.files, services.metrics)
        tools = Tools(services.jobs, tuner, publisher, services.metrics, info.name)
        service = JobService(tools, services.jobs_folder, services.worker, services.settings.max_jobs)
        await service.start()
        services.tuning, services.on_load = service, tuner.load
        try:
            await asyncio.Event().wait()
        finally:
            services.tuning = services.on_load = None
            await service.stop(services.settings.drain_seconds)


def stats_handler(services: Services, background: Background) -> Callable[[EngineStats], None]:
    """What to do with the engine's reports: metrics, and the registry's note of quarantined deltas."""

    def take(stats: EngineStats) -> None:
        if services.on_load is not None:
            services.on_load(stats.rows_running + stats.rows_waiting)
        for digest, reason in services.metrics.apply_stats(stats, services.engine.restarts).items():
            log.error("delta_quarantined", digest=digest, reason=reason)
            background.start(_quarantine(services, digest, reason))

    return take


async def _quarantine(services: Services, digest: str, reason: str) -> None:
    await services.registry.quarantine(digest, reason)


def blob_folder(settings: Settings) -> Path:
    """Where tensors live: the folder of ``--blob-url``, else one in the data folder."""
    if settings.blob_url is None:
        return settings.data_dir / "blobs"
    return Path(unquote(urlsplit(settings.blob_url).path))


def _describe(info: BackboneInfo) -> Backbone:
    """Site table and tokenizer of the resident backbone. Blocking: imports transformers, reads files."""
    from transformers import AutoConfig  # seconds to import: not before the port is open

    from deltas.backbones import describe
    from deltas.backbones.stored import as_stored
    from deltas.weights import FrozenTensors
    from server.engine.tokenizer import Tokenizer

    config = AutoConfig.from_pretrained(info.folder, local_files_only=True)
    spec = as_stored(describe(config, info.revision), FrozenTensors(Path(info.folder)))
    return Backbone(info, spec, Tokenizer(Path(info.folder)))


def _shared_memory(stack: AsyncExitStack) -> int:
    """Memory for the backbone's weights, which the engine fills and the tuner maps."""
    weights = create_shared()
    stack.callback(os.close, weights)
    return weights


async def keep_valkey(valkey: EmbeddedValkey, services: Services) -> None:
    """Start the embedded Valkey again whenever it dies; if it stays down, the server cannot go on."""
    try:
        await valkey.supervise()
    except OSError as error:
        services.state.fail(f"the embedded Valkey does not come back: {error}")


async def _embedded_valkey(settings: Settings, stack: AsyncExitStack) -> EmbeddedValkey | None:
    """The server's own Valkey, running, where no other Redis is given; ``stack`` ends it."""
    if settings.redis_url is not None:
        return None
    valkey = EmbeddedValkey(settings.data_dir / "valkey")
    await valkey.start()
    stack.push_async_callback(valkey.stop)
    return valkey
