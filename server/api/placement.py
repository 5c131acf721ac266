"""Tiers by the user's hand: where a delta is, where it shall be, and pins, which outlive the engine and the server.

Pins are stored by version; the engine knows one for a digest, the highest of those of all versions with that content,
whoever owns them. ``services.placing`` keeps changes of pins apart, so that the engine's agree with the stored ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from server import logging
from server.api.services import Services
from server.errors import DeltaserveError, EngineRestarting, Quarantined, Unavailable
from server.store.pins import Pin, pinned_name
from server.types import DeltaRecord, DeltaRef, PinTier, Residence, Tier

log = logging.get("server.api")

_RETRY_SECONDS = 1.0


async def show(services: Services, record: DeltaRecord) -> dict[str, object]:
    """The ``delta.residency`` object. Raises ``Unavailable`` while there is no engine to ask."""
    services.accept_work()
    where = await services.engine.where(record.digest)
    pinned = any(pin.version == pinned_name(record) for pin in await services.registry.pins.list())
    return _object(record, where, pinned)


async def place(services: Services, record: DeltaRecord, tier: Tier, *, pinned: bool) -> dict[str, object]:
    """Bring a version to a tier now, and pin it there or let it go; its ``delta.residency`` then.

    Another version of the same content that is pinned higher keeps it there. Raises ``Conflict`` where there is no room
    for it or its pin, ``DeltaRefused``, ``Quarantined``, ``Unavailable``; then its pin is as before.
    """
    services.accept_work()
    if record.status == "quarantined" and tier != "disk":
        raise Quarantined(f"The delta '{record.id}' is quarantined: {record.status_reason}.", param="name")
    own: PinTier | None = tier if pinned and tier != "disk" else None
    async with services.placing:
        pins = await services.registry.pins.list()
        before = _highest(pins).get(record.digest)
        others = _highest(pin for pin in pins if pin.version != pinned_name(record)).get(record.digest)
        held: PinTier | None = "device" if "device" in (own, others) else own or others
        target: Tier = "device" if "device" in (tier, held) else held or tier
        where = await services.engine.place(_ref(services, record.digest), target, held)
        try:
            await services.registry.pins.set(record, own)
        except DeltaserveError:
            services.engine.pin(record.digest, before)
            raise
    return _object(record, where, own is not None)


@asynccontextmanager
async def deleting(services: Services) -> AsyncGenerator[None, None]:
    """Around what deletes versions: the engine hears of pins that went with them."""
    async with services.placing:
        before = _highest(await services.registry.pins.list())
        yield
        after = _highest(await services.registry.pins.list()) if before else {}
        for digest, tier in before.items():
            if after.get(digest) != tier:
                services.engine.pin(digest, after.get(digest))


async def restore(services: Services) -> None:
    """Bring every pinned delta to its tier, in an engine that has just started. One that cannot be there is logged."""
    while True:
        async with services.placing:
            try:
                pins = await services.registry.pins.list()
            except Unavailable as error:
                log.warning("pins_not_read", reason=error.message)
            else:
                await _restore(services, _highest(pins))
                return
        await asyncio.sleep(_RETRY_SECONDS)


async def _restore(services: Services, pins: dict[str, PinTier]) -> None:
    for digest, tier in pins.items():
        try:
            await services.engine.place(_ref(services, digest), tier, tier)
        except EngineRestarting:
            return  # its successor begins anew
        except DeltaserveError as error:
            log.error("pin_not_restored", digest=digest, tier=tier, reason=error.message)


def _highest(pins: Iterable[Pin]) -> dict[str, PinTier]:
    """For each pinned digest, the highest tier."""
    found: dict[str, PinTier] = {}
    for pin in pins:
        if found.get(pin.digest) != "device":
            found[pin.digest] = pin.tier
    return found


def _ref(services: Services, digest: str) -> DeltaRef:
    return DeltaRef(digest, str(services.blobs.path(digest)))


def _object(record: DeltaRecord, where: Residence, pinned: bool) -> dict[str, object]:
    return {
        "object": "delta.residency",
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "tier": where.tier,
        "pinned": pinned,
        "bytes": record.bytes if where.tier == "disk" else where.bytes,
    }
