"""Tiers: which deltas are on the device, which on the host, which only on disk.

Loading never happens on the step loop: a small pool of threads reads, checks and packs a delta once however many
rows ask for it; the loop collects what is done and puts it on the device if its budget has room. A row whose delta is
not there is skipped by the scheduler, never waited for.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deltas import methods
from deltas.bank import PackedDelta
from deltas.delta import Delta
from deltas.errors import DeltaError
from deltas.formats import native
from deltas.pack import pack
from deltas.sites import BackboneSpec
from deltas.weights import Source
from server.types import DeltaPart, DeltaRef

LOADERS = 2


@dataclass(frozen=True)
class LoadFailure:
    """A delta that could not be brought to the device. ``of_sum``: its parts are sound, what is asked of them is not."""

    digest: str
    message: str
    of_sum: bool = False


@dataclass(eq=False)
class _Resident:
    delta: PackedDelta
    references: int = 0


@dataclass
class Counts:
    """Cumulative, but for ``seconds``, which the reader empties."""

    from_host: int = 0
    from_disk: int = 0
    failures: int = 0
    seconds: list[float] = field(default_factory=list)


class Residency:
    """Device and host tiers with byte budgets, both least-recently-used. Owned by the step loop.

    A sum of deltas is a delta like any other here, but that it goes when one of its parts is dropped.

    ``weights`` gives the backbone's own tensors to methods that depend on them. ``finish`` turns a packed delta into
    what is kept on the device (a soft prompt's keys and values are computed there) and may refuse it with a
    :class:`DeltaError`; ``forget`` hears of every delta that leaves; ``wake`` is called from a loader thread when it
    has a result.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        weights: Source | None = None,
        device_bytes: int,
        host_bytes: int,
        finish: Callable[[PackedDelta], PackedDelta],
        forget: Callable[[PackedDelta], None],
        wake: Callable[[], None],
    ) -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._weights = weights
        self._device_bytes, self._host_bytes = device_bytes, host_bytes
        self._finish, self._forget, self._wake = finish, forget, wake
        self._on_device: OrderedDict[str, _Resident] = OrderedDict()
        self._on_host: OrderedDict[str, PackedDelta] = OrderedDict()
        self._loading: set[str] = set()  # in a loader's hands
        self._sums: dict[str, frozenset[str]] = {}  # the digests of a sum's parts, for sums in any tier
        self._asked: dict[str, float] = {}  # when a delta that is not on the device was first asked for
        self._dropped: set[str] = set()
        self._short: str | None = None  # the delta that waits for room: no other may take what it needs
        self._short_asked = False
        self._promised: set[str] = set()  # found on the device in this step: not evicted before the next
        self._done: list[tuple[str, PackedDelta | LoadFailure]] = []
        self._failed: list[LoadFailure] = []
        self._pool = ThreadPoolExecutor(LOADERS, thread_name_prefix="delta-loader")
        self.counts = Counts()

    def prefetch(self, ref: DeltaRef) -> None:
        """Starts reading a delta from disk, if it is in no tier above; it takes no room on the device yet."""
        digest = ref.digest
        self._dropped.discard(digest)
        if digest not in self._on_device and digest not in self._on_host and digest not in self._loading:
            self._loading.add(digest)
            self._asked[digest] = time.monotonic()
            if ref.parts:
                self._sums[digest] = frozenset(part.digest for part in ref.parts)
            self._pool.submit(self._load, ref)

    def resident(self, ref: DeltaRef) -> PackedDelta | None:
        """The delta if it is on the device, or can be put there now; otherwise None, and it is on its way."""
        self.prefetch(ref)
        found = self._on_device.get(ref.digest)
        if found is not None:
            self._on_device.move_to_end(ref.digest)
            self._promised.add(ref.digest)
            return found.delta
        if ref.digest not in self._on_host:
            return None
        return self._admit(ref.digest)

    def acquire(self, digest: str) -> PackedDelta:
        """A row starts to use a resident delta; it stays on the device until the row releases it."""
        found = self._on_device[digest]
        found.references += 1
        return found.delta

    def release(self, digest: str) -> None:
        """A row ended."""
        self._on_device[digest].references -= 1
        if digest in self._dropped:
            self._drop(digest)

    def drop(self, digest: str) -> None:
        """The delta was deleted: it and the sums it is part of leave every tier, once their last row is done and no
        loader is at them.
        """
        self._drop(digest)
        for whole in [whole for whole, parts in self._sums.items() if digest in parts]:
            self._drop(whole)

    def _drop(self, digest: str) -> None:
        found = self._on_device.get(digest)
        if digest in self._loading or (found is not None and found.references):
            self._dropped.add(digest)
            return
        self._dropped.discard(digest)
        self._on_host.pop(digest, None)
        self._asked.pop(digest, None)
        if found is not None:
            self._evict(digest)

    def collect(self) -> list[LoadFailure]:
        """Takes in what the loaders finished; says what failed. Called once a step, before deltas are asked for."""
        while self._done:
            digest, result = self._done.pop(0)
            self._loading.discard(digest)
            if isinstance(result, PackedDelta):
                self._keep_on_host(digest, result)
                self.counts.from_disk += 1
            else:
                self._fail(result)
            if digest in self._dropped:
                self._drop(digest)
        self._forget_sums()
        if not self._short_asked:
            self._short = None  # nobody wants it any more
        self._short_asked = False
        self._promised.clear()
        failures, self._failed = self._failed, []
        return failures

    def _admit(self, digest: str) -> PackedDelta | None:
        delta = self._on_host[digest]
        self._on_host.move_to_end(digest)
        size, budget = delta.nbytes, self._device_bytes
        if size > budget:
            self._refuse(digest, f"the delta needs {size} bytes on the device; --delta-bytes is {budget}")
            return None
        if self._short not in (None, digest):
            return None
        if not self._make_room(size):
            self._short, self._short_asked = digest, True
            return None
        self._short = None
        try:
            placed = self._finish(delta.to(self._device))
        except DeltaError as error:
            self._refuse(digest, str(error))
            return None
        self._on_device[digest] = _Resident(placed)
        self._promised.add(digest)
        if placed.prompt is None and delta.prompt is not None:  # keep what was computed once
            self._keep_on_host(digest, placed.to(torch.device("cpu")))
        asked = self._asked.pop(digest, None)
        if asked is None:
            self.counts.from_host += 1
        else:
            self.counts.seconds.append(time.monotonic() - asked)
        return placed

    def _refuse(self, digest: str, message: str) -> None:
        """A delta that was read cannot be placed; the next step hears of it."""
        self._on_host.pop(digest)
        self._fail(LoadFailure(digest, message, of_sum=digest in self._sums))
        self._wake()

    def _fail(self, failure: LoadFailure) -> None:
        self._asked.pop(failure.digest, None)
        self.counts.failures += 1
        self._failed.append(failure)

    def _forget_sums(self) -> None:
        """Lets go of what is known of sums that have left every tier, once they may outnumber those that are in one."""
        if len(self._sums) > len(self._on_device) + len(self._on_host) + len(self._loading):
            held = self._on_device.keys() | self._on_host.keys() | self._loading
            self._sums = {digest: parts for digest, parts in self._sums.items() if digest in held}

    def _make_room(self, nbytes: int) -> bool:
        over = self.bytes_on_device + nbytes - self._device_bytes
        victims: list[str] = []
        for digest, resident in self._on_device.items():
            if over <= 0:
                break
            if resident.references == 0 and digest not in self._promised:
                over -= resident.delta.nbytes
                victims.append(digest)
        if over > 0:
            return False
        for digest in victims:
            self._evict(digest)
        return True

    def _evict(self, digest: str) -> None:
        self._forget(self._on_device.pop(digest).delta)

    def _keep_on_host(self, digest: str, delta: PackedDelta) -> None:
        self._on_host[digest] = delta
        self._on_host.move_to_end(digest)
        over = self.bytes_on_host - self._host_bytes
        for old in list(self._on_host):
            if over <= 0 or old == digest:
                break
            over -= self._on_host.pop(old).nbytes
            self._asked.pop(old, None)

    def _load(self, ref: DeltaRef) -> None:
        result: PackedDelta | LoadFailure
        try:
            result = self._lowered(ref)
        except Exception as error:  # noqa: BLE001 - a loader must always answer: its rows wait for it
            result = LoadFailure(ref.digest, f"{type(error).__name__}: {error}")
        self._done.append((ref.digest, result))
        self._wake()

    def _lowered(self, ref: DeltaRef) -> PackedDelta | LoadFailure:
        """Reads and verifies every part, each by itself; only then is what fails the sum's fault."""
        try:
            parts = [(_read(part), part.weight) for part in ref.summands]
            for delta, _ in parts:
                methods.check(delta, self._spec)
        except (DeltaError, OSError) as error:
            return LoadFailure(ref.digest, str(error))
        try:
            patches = methods.lower_sum(parts, self._spec, self._weights)
            return pack(patches, self._spec, self._dtype, pin=self._device.type == "cuda")
        except DeltaError as error:
            return LoadFailure(ref.digest, str(error), of_sum=bool(ref.parts))

    @property
    def bytes_on_device(self) -> int:
        return sum(resident.delta.nbytes for resident in self._on_device.values())

    @property
    def bytes_on_host(self) -> int:
        return sum(delta.nbytes for delta in self._on_host.values())

    @property
    def count_on_device(self) -> int:
        return len(self._on_device)

    @property
    def count_on_host(self) -> int:
        return len(self._on_host)

    def close(self) -> None:
        """Stops the loaders."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _read(part: DeltaPart) -> Delta:
    delta = native.load(Path(part.path))
    if delta.digest != part.digest:
        raise DeltaError(f"the stored tensors of {part.digest[:12]} are damaged: their digest differs")
    return delta
