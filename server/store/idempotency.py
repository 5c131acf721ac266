"""Answers remembered under an ``Idempotency-Key``, so that a request sent twice is carried out once.

A request first *begins*: it gets a claim, or the answer of the one before it. A claim ends with ``finish``
(the answer is remembered) or ``forget`` (the request failed and may be sent again), or it expires when its
process died.

Answers stand in Redis as they are. Never remember one that shows a secret, such as a new API key.
"""

from __future__ import annotations

import secrets
import time

import msgspec
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, Unavailable
from server.store.connect import load_script
from server.store.keys import Keys

REMEMBER_SECONDS = 24 * 3600
CLAIM_SECONDS = 60
LONGEST_KEY = 255


class StoredAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP answer: enough to send it again."""

    status: int
    headers: dict[str, str] = {}
    body: bytes = b""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """The right to carry out one request. ``value`` tells it from a later claim of the same key."""

    tenant: str
    route: str
    key: str
    body_hash: str
    value: bytes


class _Memory(msgspec.Struct, frozen=True, array_like=True):
    """What is stored: the claim while ``answer`` is None."""

    body_hash: str
    nonce: str
    answer: StoredAnswer | None = None


class IdempotencyStore:
    """Remembered answers of all tenants; a key means nothing beyond its tenant and route."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        remember_seconds: int = REMEMBER_SECONDS,
        claim_seconds: int = CLAIM_SECONDS,
    ) -> None:
        self._keys = keys
        self._remember_seconds = remember_seconds
        self._claim_seconds = claim_seconds
        self._begin = load_script(redis, "idempotency_begin")
        self._settle = load_script(redis, "idempotency_settle")

    async def begin(self, tenant: str, route: str, key: str, body_hash: str) -> Claim | StoredAnswer:
        """A claim when this is the first such request, else the answer that was given to it.

        ``route`` is the method and path, ``body_hash`` any hash of the body.

        Raises InvalidRequest (the key is empty or too long), Conflict (the key came with another body), and
        Unavailable, to be sent again soon, while the first request is still at work.
        """
        if not 1 <= len(key) <= LONGEST_KEY:
            rule = f"an Idempotency-Key has 1 to {LONGEST_KEY} characters"
            raise InvalidRequest(rule, param="Idempotency-Key")
        value = msgspec.msgpack.encode(_Memory(body_hash, secrets.token_hex(8)))
        known = await self._begin(
            keys=self._names(tenant, route, key), args=[value, self._claim_seconds, int(time.time())]
        )
        if known is None:
            return Claim(tenant=tenant, route=route, key=key, body_hash=body_hash, value=value)
        memory = msgspec.msgpack.decode(known, type=_Memory)
        if memory.body_hash != body_hash:
            raise Conflict(
                "this Idempotency-Key was used with another body", param="Idempotency-Key", code="key_reused"
            )
        if memory.answer is None:
            raise Unavailable("the first request with this Idempotency-Key is still at work")
        return memory.answer

    async def finish(self, claim: Claim, answer: StoredAnswer) -> bool:
        """Remember the answer. False when the claim had expired: nothing is remembered then."""
        memory = _Memory(claim.body_hash, "", answer)
        return await self._settled(claim, msgspec.msgpack.encode(memory))

    async def forget(self, claim: Claim) -> bool:
        """Give the claim up, so that the request can be carried out again. False when it had expired."""
        return await self._settled(claim, b"")

    async def _settled(self, claim: Claim, answer: bytes) -> bool:
        done = await self._settle(
            keys=self._names(claim.tenant, claim.route, claim.key),
            args=[claim.value, answer, self._remember_seconds, int(time.time())],
        )
        return bool(done)

    def _names(self, tenant: str, route: str, key: str) -> list[str]:
        return [self._keys.idempotency(tenant, route, key), self._keys.idempotency_index(tenant)]
