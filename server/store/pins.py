"""Which versions of deltas their tenants keep in a tier. A pin goes with its version."""

from __future__ import annotations

import msgspec
from redis.asyncio import Redis

from server.errors import ModelNotFound
from server.store.connect import StoreError, as_text, load_script
from server.store.keys import Keys
from server.types import DeltaRecord, PinTier


class Pin(msgspec.Struct, frozen=True):
    """A version's pin. ``version`` is ``TENANT/NAME@VERSION``."""

    version: str
    digest: str
    tier: PinTier


class Pins:
    """All tenants' pins. Methods raise Unavailable while Redis cannot be reached."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._pin = load_script(redis, "delta_pin")

    async def set(self, record: DeltaRecord, tier: PinTier | None) -> None:
        """Pin a version to a tier, or let it go (None). Raises ModelNotFound when it was deleted meanwhile."""
        found = await self._pin(
            keys=[self._keys.delta(record.tenant, record.name), self._keys.pins],
            args=[pinned_name(record), record.version, tier or ""],
        )
        if not found:
            raise ModelNotFound(f"the model {record.id} does not exist", param="model")

    async def list(self) -> list[Pin]:
        """Every pin, in the order of the versions' names."""
        fields = await self._redis.hgetall(self._keys.pins)
        return sorted(
            (_pin(as_text(name), as_text(value)) for name, value in fields.items()),
            key=lambda pin: pin.version,
        )


def pinned_name(record: DeltaRecord) -> str:
    """What a version's pin is called."""
    return f"{record.tenant}/{record.id}"


def _pin(name: str, value: str) -> Pin:
    tier, _, digest = value.partition(":")
    match tier:
        case "device" | "host":
            return Pin(name, digest, tier)
        case _:
            raise StoreError(f"the pin of {name} names no tier: {tier!r}")
