"""Tiers: which deltas are on the device, which on the host, which only on disk.

Loading never happens on the step loop: the loaders read, check and pack a delta once however many rows ask for it;
the loop collects what is done and puts it on the device if its budget has room. A row whose delta is not there is
skipped by the scheduler, never waited for. Who gets room when there is too little: ``claims.py``.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from deltas.bank import PackedDelta
from deltas.errors import DeltaError
from deltas.sites import BackboneSpec
from deltas.weights import Source
from server.engine.claims import Candidate, Claims
from server.engine.copies import Copies
from server.engine.loaders import LOADERS, Loaders, LoadFailure
from server.types import DeltaRef, PinTier, Residence


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

    A pinned delta is not evicted from its tier to make room for others; pins may take ``pinned_share`` of a tier's
    bytes, so that others can go on.

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
        pinned_share: float,
        finish: Callable[[PackedDelta], PackedDelta],
        forget: Callable[[PackedDelta], None],
        wake: Callable[[], None],
    ) -> None:
        self._device = device
        self._device_bytes, self._host_bytes, self._pinned_share = device_bytes, host_bytes, pinned_share
        self._finish, self._forget, self._wake = finish, forget, wake
        self._on_device: OrderedDict[str, _Resident] = OrderedDict()
        self._on_host: OrderedDict[str, PackedDelta] = OrderedDict()
        self._device_used = self._host_used = 0  # bytes
        self._loading: set[str] = set()  # in a loader's hands
        self._sums: dict[str, frozenset[str]] = {}  # the digests of a sum's parts, for sums in any tier
        self._asked: dict[str, float] = {}  # when a delta that is not on the device was first asked for
        self._dropped: set[str] = set()
        self._leaving: set[str] = set()  # leave the device after their last row, unless another asks
        self._pins: dict[str, PinTier] = {}
        self._claims = Claims()
        self._promised: set[str] = set()  # found on the device in this step: not evicted before the next
        self._done: list[tuple[str, PackedDelta | LoadFailure]] = []
        self._failed: list[LoadFailure] = []
        self._copies = Copies(device, wake)
        self._loaders = Loaders(spec, dtype, device, weights, self._loaded)
        self.counts = Counts()

    def prefetch(self, ref: DeltaRef) -> None:
        """Starts reading a delta from disk, if it is in no tier above; it takes no room on the device yet."""
        digest = ref.digest
        self._dropped.discard(digest)
        self._leaving.discard(digest)
        if self._is_away(digest):
            self._loading.add(digest)
            self._asked[digest] = time.monotonic()
            if ref.parts:
                self._sums[digest] = frozenset(part.digest for part in ref.parts)
            self._loaders.load(ref)

    def resident(self, ref: DeltaRef) -> PackedDelta | None:
        """The delta if it is on the device, or can be put there now; otherwise None, and it comes as soon as it can.

        None too for a delta on the device that is to give way to one that has waited for long: only running rows use it.
        One that left the host before its turn came is read again only when it could soon have a place: rows whose
        deltas do not fit together must not push each other's out for ever.
        """
        digest = ref.digest
        if not self._is_away(digest) or (
            len(self._loading) < LOADERS and self._claims.holder in (None, digest)
        ):
            self.prefetch(ref)
        delta: PackedDelta | None = None
        found = self._on_device.get(digest)
        if found is None:
            delta = self._admit(digest) if digest in self._on_host else None
        elif digest not in self._claims.closed:
            delta = found.delta
        if delta is None:
            self._claims.miss(digest)
            return None
        self._on_device.move_to_end(digest)
        self._promised.add(digest)
        return delta

    def acquire(self, digest: str) -> PackedDelta:
        """A row starts to use a resident delta; it stays on the device until the row releases it."""
        found = self._on_device[digest]
        found.references += 1
        return found.delta

    def release(self, digest: str) -> None:
        """A row ended."""
        found = self._on_device[digest]
        found.references -= 1
        if digest in self._dropped:
            self._drop(digest)
        elif digest in self._leaving and not found.references:
            self._evict(digest)

    def drop(self, digest: str) -> None:
        """The delta was deleted: it and the sums it is part of leave every tier, once their last row is done and no
        loader is at them.
        """
        self._pins.pop(digest, None)
        self._drop(digest)
        for whole in [whole for whole, parts in self._sums.items() if digest in parts]:
            self._drop(whole)

    def _drop(self, digest: str) -> None:
        found = self._on_device.get(digest)
        if digest in self._loading or (found is not None and found.references):
            self._dropped.add(digest)
            return
        self._dropped.discard(digest)
        self._take_off_host(digest)
        self._asked.pop(digest, None)
        if found is not None:
            self._evict(digest)

    # -- tiers by the user's hand ------------------------------------------------------------------------------

    def where(self, digest: str) -> Residence:
        """The highest tier that holds the delta."""
        if (found := self._on_device.get(digest)) is not None:
            return Residence("device", found.delta.nbytes)
        if (packed := self._on_host.get(digest)) is not None:
            return Residence("host", packed.nbytes)
        return Residence("disk", 0)

    def arriving(self, digest: str) -> bool:
        """Whether the delta is being copied from the host to the device."""
        return self._copies.moving(digest)

    def to_host(self, digest: str) -> None:
        """A delta of the host or the device stays on the host only, once its running rows are done."""
        found = self._on_device.get(digest)
        if found is None:
            return
        if digest not in self._on_host:
            self._keep_on_host(digest, found.delta.to(torch.device("cpu")))
        if found.references:
            self._leaving.add(digest)
        else:
            self._evict(digest)

    def to_disk(self, digest: str) -> None:
        """A delta leaves device and host, once its running rows are done, until a row asks for it again."""
        self._drop(digest)

    def pin(self, digest: str, tier: PinTier | None) -> None:
        """Keeps a delta in a tier from now on, or lets it go (None). Whether it may be: :meth:`refuses_pin`."""
        if tier is None:
            self._pins.pop(digest, None)
        else:
            self._pins[digest] = tier

    def refuses_pin(self, digest: str, tier: PinTier | None) -> str | None:
        """Why a delta of the host or the device cannot be pinned to a tier; None if it can."""
        if tier is None or self._pins.get(digest) == tier:
            return None
        size = self.where(digest).bytes
        budget, flag = self._device_bytes, "--delta-bytes"
        if tier == "host":
            budget, flag = self._host_bytes, "--host-delta-bytes"
        others = self._pinned_bytes(tier, but=digest)
        limit = int(budget * self._pinned_share)
        if others + size > limit:
            return (
                f"the delta takes {size} bytes; pinned deltas may take {limit} in all (--pinned-delta-share "
                f"{self._pinned_share:g} of {flag} {budget}), and others take {others} of these"
            )
        free = (self._on_device.keys() | self._on_host.keys()) - {digest} - self._pins.keys()
        left, largest = budget - others - size, max((self.where(d).bytes for d in free), default=0)
        if tier == "device" and left < largest:
            return f"pinned, the delta would leave {left} of {flag} {budget}; the largest delta in memory takes {largest}"
        return None

    def no_room(self, digest: str) -> str:
        """Why a delta of the host cannot be put on the device now."""
        size, budget = self.where(digest).bytes, self._device_bytes
        used = sum(r.delta.nbytes for r in self._on_device.values() if r.references)
        return (
            f"the delta needs {size} bytes on the device, of --delta-bytes {budget}; pinned deltas hold "
            f"{self._pinned_bytes('device', but=digest)}, deltas of running rows {used}, and waiting rows come first"
        )

    def _pinned_bytes(self, tier: PinTier, *, but: str) -> int:
        """What the pinned deltas that are in their tier take there, without one of them."""
        held = (
            self._held(digest, tier)
            for digest, pinned in self._pins.items()
            if pinned == tier and digest != but
        )
        return sum(delta.nbytes for delta in held if delta is not None)

    def _held(self, digest: str, tier: PinTier) -> PackedDelta | None:
        if tier == "host":
            return self._on_host.get(digest)
        found = self._on_device.get(digest)
        return None if found is None else found.delta

    # -- the step ----------------------------------------------------------------------------------------------

    @property
    def reserved_for_nobody(self) -> bool:
        """Room is kept for a delta that nobody asked for in this step; the next step frees it."""
        return self._claims.unasked

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
        self._claims.begin_step()
        self._promised.clear()
        failures, self._failed = self._failed, []
        return failures

    def _admit(self, digest: str) -> PackedDelta | None:
        if not self._claims.allow(digest):
            return None
        delta = self._on_host[digest]
        self._on_host.move_to_end(digest)
        size, budget = delta.nbytes, self._device_bytes
        if size > budget:
            self._refuse(digest, f"the delta needs {size} bytes on the device; --delta-bytes is {budget}")
            return None
        if size > budget - (pinned := self._pinned_bytes("device", but=digest)):
            message = (
                f"the delta needs {size} bytes on the device; of --delta-bytes {budget}, pins hold {pinned}"
            )
            self._refuse(digest, message)
            return None
        if not self._make_room(size):
            self._claims.wait(digest)
            if self._claims.overdue:
                self._claims.close(self._movable(), self.bytes_on_device + size - budget)
            return None
        self._claims.settle()
        moved = self._copies.fetch(digest, delta)
        if moved is None:
            return None
        try:
            placed = self._finish(moved)
        except DeltaError as error:
            self._refuse(digest, str(error))
            return None
        self._on_device[digest] = _Resident(placed)
        self._device_used += placed.nbytes
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
        if digest not in self._pins:
            self._take_off_host(digest)
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
        for digest, size, users in self._movable():
            if over <= 0:
                break
            if not users and digest not in self._promised:
                over -= size
                victims.append(digest)
        if over > 0:
            return False
        for digest in victims:
            self._evict(digest)
        return True

    def _movable(self) -> Iterator[Candidate]:
        """The deltas on the device that are not pinned there, least recently used first."""
        for digest, resident in self._on_device.items():
            if self._pins.get(digest) != "device":
                yield Candidate(digest, resident.delta.nbytes, resident.references)

    def _evict(self, digest: str) -> None:
        self._leaving.discard(digest)
        gone = self._on_device.pop(digest).delta
        self._device_used -= gone.nbytes
        self._forget(gone)

    def _keep_on_host(self, digest: str, delta: PackedDelta) -> None:
        self._take_off_host(digest)
        self._on_host[digest] = delta
        self._host_used += delta.nbytes
        over = self.bytes_on_host - self._host_bytes
        for old in list(self._on_host):
            if over <= 0 or old == digest:
                break
            if old in (self._claims.holder, self._claims.first) or self._pins.get(old) == "host":
                continue
            over -= self._on_host[old].nbytes
            self._take_off_host(old)
            self._asked.pop(old, None)

    def _take_off_host(self, digest: str) -> None:
        if (delta := self._on_host.pop(digest, None)) is not None:
            self._host_used -= delta.nbytes

    def _is_away(self, digest: str) -> bool:
        """On the disk only, and not being read."""
        return not (digest in self._on_device or digest in self._on_host or digest in self._loading)

    def _loaded(self, digest: str, result: PackedDelta | LoadFailure) -> None:
        """Called by a loader's thread."""
        self._done.append((digest, result))
        self._wake()

    @property
    def bytes_on_device(self) -> int:
        return self._device_used

    @property
    def bytes_on_host(self) -> int:
        return self._host_used

    @property
    def count_on_device(self) -> int:
        return len(self._on_device)

    @property
    def count_on_host(self) -> int:
        return len(self._on_host)

    def close(self) -> None:
        """Stops the loaders."""
        self._loaders.close()
        self._copies.close()
