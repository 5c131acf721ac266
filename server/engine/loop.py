"""What every engine's step loop does, whatever its rows are: the inbox, deltas on their way, probes, quarantine, reports.

One thread owns everything here. A subclass brings its rows: how they are accepted, stepped, and answered.
"""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from deltas.bank import PackedDelta
from deltas.weights import FrozenTensors
from server.engine.backbone import Backbone
from server.engine.loaders import LoadFailure
from server.engine.messages import (
    Cancel,
    Drop,
    Encode,
    Failed,
    Load,
    Loaded,
    Pin,
    Place,
    Reply,
    Request,
    Resides,
    Stats,
    Submit,
    Where,
)
from server.engine.probe import AnyProbe
from server.engine.quarantine import Quarantine
from server.engine.residency import Residency
from server.errors import Conflict, DeltaRefused, InvalidComposition, Quarantined, RowFailed
from server.types import BackboneInfo, DeltaRef, EngineStats, ProbeResult

log = structlog.get_logger(__name__)

STATS_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _Wake:
    """A loader has something; the loop looks by itself."""


class StepLoop(ABC):
    """Takes requests in and steps until told to stop.

    ``finish`` and ``forget`` are :class:`~server.engine.residency.Residency`'s.
    """

    def __init__(
        self,
        info: BackboneInfo,
        backbone: Backbone,
        probe: AnyProbe[Any],
        send: Callable[[Reply], None],
        *,
        finish: Callable[[PackedDelta], PackedDelta],
        forget: Callable[[PackedDelta], None],
        delta_bytes: int,
        host_delta_bytes: int,
        pinned_delta_share: float,
    ) -> None:
        self.info = info
        self._probe = probe
        self._send = send
        self._inbox: queue.SimpleQueue[Request | _Wake | None] = queue.SimpleQueue()
        self._loads: dict[str, list[Load]] = {}  # by digest: who waits for it
        self._places: list[Place] = []
        self._idle = False
        self._next_expiry: float | None = None
        self._steps = 0
        self._reported = 0.0
        self._batch_rows: list[int] = []
        self._batch_deltas: list[int] = []
        self._queued: list[float] = []
        self._quarantine = Quarantine()
        self.residency = Residency(
            backbone.spec,
            backbone.dtype,
            backbone.device,
            weights=FrozenTensors(backbone.folder),
            device_bytes=delta_bytes,
            host_bytes=host_delta_bytes,
            pinned_share=pinned_delta_share,
            finish=finish,
            forget=forget,
            wake=lambda: self._inbox.put(_Wake()),
        )

    # -- what a subclass brings --------------------------------------------------------------------------------

    @abstractmethod
    def _accept(self, request: Submit | Encode) -> None:
        """Takes rows in, or answers those that cannot run."""

    @abstractmethod
    def _cancel(self, row_id: int) -> None:
        """Nobody waits for this row any more, if it is still here."""

    @abstractmethod
    def _step(self) -> bool:
        """Runs what can run. False: there was nothing."""

    @abstractmethod
    def _expire(self) -> float | None:
        """Answers the rows that have waited too long to begin; in how many seconds it may be needed next, if ever."""

    @abstractmethod
    def _fail_waiting(self, digest: str, code: str, message: str) -> None:
        """Answers the rows that wait for a delta that cannot be loaded."""

    @abstractmethod
    def _check_integrity(self) -> None:
        """Called when there is nothing to do: raises if the books do not add up."""

    @abstractmethod
    def _stats(self) -> EngineStats:
        """What it says of its rows; :meth:`_report` adds the rest."""

    # -- the loop ----------------------------------------------------------------------------------------------

    def receive(self, request: Request | None) -> None:
        """Hands over a request, from any thread; None ends :meth:`run`: the other side is gone."""
        self._inbox.put(request)

    def run(self) -> None:
        """Works until told to stop. An exception here ends the process, and the client starts another."""
        while self._take_in():
            for failure in self.residency.collect():
                self._fail_load(failure)
            self._next_expiry = self._expire()
            answered = self._answer_places() or self._answer_loads()
            stepped = self._step()
            # else nothing changes until something arrives; a delta just tried could not make room for another
            self._idle = not stepped and not answered and not self.residency.reserved_for_nobody
            self._report()
        self.residency.close()

    def _take_in(self) -> bool:
        """Handles what has arrived; waits for something if there is nothing to run. False: it is time to leave."""
        block = self._idle
        if block:
            self._check_integrity()
        while True:
            try:
                request = self._inbox.get(block=block, timeout=self._next_expiry)
            except queue.Empty:
                return True
            if request is None:
                return False
            self._handle(request)
            block = False

    def _handle(self, request: Request | _Wake) -> None:
        match request:
            case Submit() | Encode():
                self._accept(request)
            case Cancel(row_id):
                self._cancel(row_id)
            case Load():
                self.residency.prefetch(request.delta)
                self._loads.setdefault(request.delta.digest, []).append(request)
            case Place():
                self._places.append(request)
            case Pin(digest, tier):
                self.residency.pin(digest, tier)
            case Where(request_id, digest):
                self._send(Resides(request_id, self.residency.where(digest)))
            case Drop(digest):
                self.residency.drop(digest)
                self._quarantine.forget(digest)
            case _Wake():
                pass

    # -- deltas ------------------------------------------------------------------------------------------------

    def _check_quarantine(self, delta: DeltaRef | None) -> None:
        """Raises :class:`Quarantined` for a sum that failed before."""
        if delta is not None and self._quarantine.refuses(delta):
            raise Quarantined("this sum of deltas is quarantined: its computation failed before")

    def _poison(self, delta: DeltaRef | None) -> str:
        """Quarantines what made a row's output no number: only its delta, or the backbone, can be the cause."""
        message = "the row's output is not a number"
        if delta is None:
            return message
        self._quarantine.add(delta, f"a row that it served became NaN or infinite in {self.info.dtype}")
        return f"{message}; its {'sum of deltas' if delta.parts else 'delta'} is quarantined"

    def _too_long(self, arrived: float) -> str:
        waited = time.monotonic() - arrived
        return f"the request waited {waited:.1f} s for a place in the batch (--queue-timeout-seconds); try again later"

    def _fail_load(self, failure: LoadFailure) -> None:
        log.warning("delta load failed", digest=failure.digest, reason=failure.message)
        load_code, row_code, what = DeltaRefused.code, RowFailed.code, "the delta could not be loaded"
        if failure.of_sum:
            load_code = row_code = InvalidComposition.code
            what = "these deltas cannot be composed"
        for load in self._loads.pop(failure.digest, []):
            self._send(Failed(load.id, load_code, failure.message))
        for place in [place for place in self._places if place.delta.digest == failure.digest]:
            self._places.remove(place)
            self._send(Failed(place.id, load_code, failure.message))
        self._fail_waiting(failure.digest, row_code, f"{what}: {failure.message}")

    def _answer_loads(self) -> bool:
        """Tries one delta that has arrived on the device: a probe costs a small step, so rows wait for one at most."""
        for digest, loads in list(self._loads.items()):
            delta = self.residency.resident(loads[-1].delta)
            if delta is None:
                continue
            del self._loads[digest]
            result = self._try(digest, delta)
            for load in loads:
                self._send(Loaded(load.id, result))
            return True
        return False

    def _try(self, digest: str, delta: PackedDelta) -> ProbeResult:
        result = self._probe.run(delta)
        if result.message:
            log.warning("probe", digest=digest, outcome=result.outcome, message=result.message)
        return result

    def _answer_places(self) -> bool:
        """Answers the first request for a tier that can be answered now."""
        for place in list(self._places):
            answer = self._place(place)
            if answer is not None:
                self._places.remove(place)
                self._send(answer)
                return True
        return False

    def _place(self, place: Place) -> Reply | None:
        """Its answer, or None while the delta is being read. For the device nobody waits: there is room or there is not."""
        digest, tiers = place.delta.digest, self.residency
        if place.tier == "disk":
            tiers.to_disk(digest)
        elif tiers.where(digest).tier == "disk":
            tiers.prefetch(place.delta)
            return None
        elif (refusal := tiers.refuses_pin(digest, place.pin)) is not None:
            return Failed(place.id, Conflict.code, refusal)
        elif place.tier == "host":
            tiers.to_host(digest)
        elif (delta := tiers.resident(place.delta)) is None:
            if tiers.where(digest).tier == "disk" or tiers.arriving(digest):
                return None  # refused, why comes with the failures of the next step; or on its way
            return Failed(place.id, Conflict.code, tiers.no_room(digest))
        elif (result := self._try(digest, delta)).outcome in ("not_finite", "failed"):
            return Failed(place.id, DeltaRefused.code, f"the delta cannot be served: {result.message}")
        tiers.pin(digest, place.pin)
        return Resides(place.id, tiers.where(digest))

    # -- reports -----------------------------------------------------------------------------------------------

    def _note_batch(self, digests: list[str]) -> None:
        """A step ran rows of these deltas; the empty string is the backbone alone."""
        self._steps += 1
        self._batch_rows.append(len(digests))
        self._batch_deltas.append(len(set(digests) - {""}))

    def _report(self) -> None:
        now = time.monotonic()
        if not self._idle and now - self._reported < STATS_SECONDS:
            return
        self._reported = now
        tiers, counts = self.residency, self.residency.counts
        stats = msgspec.structs.replace(
            self._stats(),
            deltas_device=tiers.count_on_device,
            deltas_host=tiers.count_on_host,
            delta_bytes_device=tiers.bytes_on_device,
            delta_bytes_host=tiers.bytes_on_host,
            steps=self._steps,
            loads_from_host=counts.from_host,
            loads_from_disk=counts.from_disk,
            load_failures=counts.failures,
            quarantined=dict(self._quarantine.deltas),
            load_seconds=counts.seconds,
            batch_rows=self._batch_rows,
            batch_deltas=self._batch_deltas,
            queue_seconds=self._queued,
        )
        self._send(Stats(stats))
        counts.seconds = []
        self._batch_rows, self._batch_deltas, self._queued = [], [], []
