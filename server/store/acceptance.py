"""Whether a delta that was uploaded or trained may be registered: what its first forward pass says of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from deltas.delta import Delta
from deltas.formats.files import listed
from server import logging
from server.errors import DeltaRefused
from server.metrics import Metrics
from server.store.registry import Registry
from server.types import DeltaRef, ProbeResult

log = logging.get("server.store")

_NAMED = 4  # tensors in a message


class Prober(Protocol):
    """What is needed of the engine."""

    async def load(self, delta: DeltaRef) -> ProbeResult: ...

    def drop(self, digest: str) -> None: ...


async def accept(engine: Prober, registry: Registry, metrics: Metrics, delta: Delta, file: Path) -> None:
    """Place the delta, whose native form is in ``file``, on the device, and judge what it does there.

    Refused is what cannot be placed or computed, what makes outputs NaN or infinite, and what changes nothing although
    its numbers are not all zero. A digest that is registered already and turns out to be poisonous is quarantined.
    Raises ``DeltaRefused``.
    """
    digest = delta.digest
    found = await engine.load(DeltaRef(digest, str(file)))
    param: str | None = "file"
    match found.outcome:
        case "changes" | "rounding":
            return
        case "nothing":
            zero, whole = await asyncio.to_thread(_zeros, delta)
            if whole:
                return  # it says itself that it changes nothing
            message = f"the delta changes nothing: {found.message}"
            if zero:
                param = zero[0]
                message += f"; all zero: {listed(zero, _NAMED)}; an untrained delta is like this"
        case "not_finite":
            message = f"the delta cannot be served: {found.message}"
            if await registry.quarantine(digest, found.message):
                metrics.quarantined()
                log.error("delta_quarantined", digest=digest, reason=found.message)
        case "failed":
            message = f"the delta cannot be served: {found.message}"
    if not await registry.referenced(digest):
        engine.drop(digest)
    raise DeltaRefused(message, param=param)


def _zeros(delta: Delta) -> tuple[list[str], bool]:
    """The names of the tensors that are zero throughout, and whether all are. Indices do not count."""
    floats = [
        (name, bool(tensor.any()))
        for component in delta.components
        for name, tensor in component.tensors.items()
        if tensor.is_floating_point()
    ]
    return [name for name, nonzero in floats if not nonzero], not any(nonzero for _, nonzero in floats)
