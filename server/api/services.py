"""Everything a route may use, in one place: ``app.state.services``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deltas.sites import BackboneSpec
from server.api.ports import Engine, Tokenizer
from server.config import Settings
from server.errors import EngineRestarting, Unavailable
from server.metrics import Metrics
from server.store.blobs import BlobStore
from server.store.deltas import DeltaStore
from server.store.files import FileStore
from server.store.idempotency import IdempotencyStore
from server.store.jobs import JobStore
from server.store.registry import Registry
from server.store.tasks import TaskStore
from server.store.tenants import TenantStore
from server.tenants.auth import Authenticator
from server.tuning.jobs import JobService
from server.tuning.submit import Prepare
from server.types import BackboneInfo, Principal, Turn


@dataclass(frozen=True)
class Backbone:
    """The resident backbone as the api sees it, from the moment the engine is ready (``since``, Unix
    seconds).
    """

    info: BackboneInfo
    spec: BackboneSpec
    tokenizer: Tokenizer
    since: int = field(default_factory=lambda: int(time.time()))


@dataclass
class ServerState:
    """Where the server stands in its life.

    ``draining``: no new work is taken. ``halt`` is set when the drain's time is up: what still runs ends
    with an error. ``fatal`` is why the server cannot go on. ``in_flight`` counts requests that are being
    answered.
    """

    draining: bool = False
    fatal: str | None = None
    in_flight: int = 0
    on_failure: Callable[[], None] | None = None
    halt: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    def fail(self, reason: str) -> None:
        """The server cannot go on; ``on_failure`` is told."""
        self.fatal = reason
        if self.on_failure is not None:
            self.on_failure()

    def enter(self) -> None:
        """A request begins."""
        self.in_flight += 1
        self.idle.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self.idle.set()


@dataclass
class Services:
    """What routes work with. ``resident`` is set by the lifespan once the engine is ready; ``exporting`` lets one delta
    at a time be written in another library's form; ``placing`` is held by what changes pins; ``preparing`` lets one job's
    files at a time be encoded. ``worker`` is the name under which this process holds leases of jobs; ``tuning`` is there
    while it runs them, and ``on_load`` then hears how many rows the engine has.
    """

    settings: Settings
    deltas: DeltaStore
    tenants: TenantStore
    tasks: TaskStore
    files: FileStore
    jobs: JobStore
    authenticator: Authenticator
    idempotency: IdempotencyStore
    engine: Engine
    metrics: Metrics
    worker: str
    prepare: Prepare
    state: ServerState = field(default_factory=ServerState)
    resident: Backbone | None = None
    exporting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    preparing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    tuning: JobService | None = None
    on_ready: Callable[[Backbone], None] | None = None
    on_load: Callable[[int], None] | None = None

    @property
    def registry(self) -> Registry:
        """To read from; deltas come and go through ``deltas``."""
        return self.deltas.registry

    @property
    def blobs(self) -> BlobStore:
        """To read from."""
        return self.deltas.blobs

    @property
    def upload_folder(self) -> Path:
        """Where uploads lie until they are accepted; on the data folder's file system."""
        return self.settings.data_dir / "uploads"

    @property
    def jobs_folder(self) -> Path:
        """What the tuner works on: a folder a job."""
        return self.settings.data_dir / "jobs"

    def job_folder(self, job: str) -> Path:
        """The folder of a job's data and checkpoints."""
        return self.jobs_folder / job

    def not_ready(self) -> str | None:
        """Why the server is not ready for work; None when it is."""
        if self.state.fatal is not None:
            return self.state.fatal
        if self.state.draining:
            return "the server is shutting down"
        reason = self.engine.not_ready
        if reason is None and self.resident is None:
            return "the backbone is being loaded"
        return reason

    def backbone(self) -> Backbone:
        """The backbone. Raises ``Unavailable`` until it has been resident once."""
        if self.resident is None:
            reason = self.state.fatal or self.engine.not_ready or "the backbone is being loaded"
            raise Unavailable(f"The server is not ready: {reason}.", retry_after=2)
        return self.resident

    def accept_work(self) -> Backbone:
        """The backbone, if new work can be taken now; else raises ``Unavailable`` or ``EngineRestarting``."""
        if self.state.draining:
            raise Unavailable("The server is shutting down; it takes no new work.", retry_after=2)
        resident = self.backbone()
        reason = self.engine.not_ready
        if reason is not None:
            raise EngineRestarting(f"The engine is not ready: {reason}.", retry_after=2)
        return resident

    async def turn(self, caller: Principal, priority: int | None) -> Turn:
        """When a caller's rows have their turn, by its tenant's weight of this moment."""
        return Turn(caller.tenant, await self.tenants.weight(caller.tenant), priority or 0)

    def spec(self) -> BackboneSpec:
        """The backbone's sites and sizes. Raises ``Unavailable`` until they are known."""
        return self.backbone().spec
