"""Deltas on their way from the host to the device.

On a GPU a copy goes by a stream of its own from page-locked memory, so that steps go on meanwhile: a row's delta counts
as absent until it has arrived. On a CPU there is nothing to wait for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from deltas.bank import PackedDelta
from deltas.tensors import tensors_of

MOST = 8  # copies in flight, or arrived and not fetched; the oldest is given up for another


class Arrival(Protocol):
    """The end of a copy. A CUDA event is one."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


Transfer = Callable[[PackedDelta], tuple[PackedDelta, Arrival]]
"""Starts a copy and returns what it will be, not to be read before its arrival."""


class Copies:
    """What is being copied, by digest. Owned by the step loop; ``wake`` is called from a thread when a copy arrives.

    ``transfer`` None: deltas go to ``device`` at once.
    """

    def __init__(
        self, device: torch.device, wake: Callable[[], None], transfer: Transfer | None = None
    ) -> None:
        self._device, self._wake = device, wake
        self._transfer = SideStream(device) if transfer is None and device.type == "cuda" else transfer
        self._moving: OrderedDict[str, tuple[PackedDelta, PackedDelta, Arrival]] = OrderedDict()
        self._watch = ThreadPoolExecutor(1, thread_name_prefix="delta-copy")

    def fetch(self, digest: str, delta: PackedDelta) -> PackedDelta | None:
        """The delta on the device, once; None while it is on its way, which the first call starts."""
        if self._transfer is None:
            return delta.to(self._device)
        found = self._moving.get(digest)
        if found is None or found[0] is not delta:
            moved, arrival = self._transfer(delta)
            found = self._moving[digest] = (delta, moved, arrival)
            self._watch.submit(self._await, arrival)
            while len(self._moving) > MOST:
                self._moving.popitem(last=False)
        if not found[2].query():
            return None
        del self._moving[digest]
        return found[1]

    def moving(self, digest: str) -> bool:
        """Whether a copy was started that nobody has fetched."""
        return digest in self._moving

    def close(self) -> None:
        """Waits for no copy."""
        self._watch.shutdown(wait=False, cancel_futures=True)

    def _await(self, arrival: Arrival) -> None:
        arrival.synchronize()
        self._wake()


class SideStream:
    """Copies by a CUDA stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, delta: PackedDelta) -> tuple[PackedDelta, Arrival]:
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = delta.to(self._device)
            for tensor in tensors_of(
                [moved.arena, moved.prefix, moved.prompt, moved.prefixes, moved.head, moved.patches]
            ):
                tensor.record_stream(
                    computing
                )  # its memory is not another's before what computes with it is done
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(self._stream)
        return moved, arrival
