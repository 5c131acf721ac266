"""Tenants and their API keys.

A key is random and shown once. Only its HMAC-SHA256 under the server's secret is kept, so a stolen registry
opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Mapping

import msgspec
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, NotFound, Unavailable
from server.store.connect import as_text, load_script
from server.store.keys import Keys
from server.store.reference import check_tenant, is_tenant, shown
from server.store.registry import check_limit
from server.types import DEFAULT_TENANT, ApiKey, Page, Principal, Tenant

KEY_PREFIX = "ds-"
_KEY_BYTES = 32
_LONGEST_KEY = 512
_LIMIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
WEIGHT = "weight"  # the limit that is a tenant's fair share
SMALLEST_WEIGHT, LARGEST_WEIGHT = 0.001, 1000.0
_KEY_ID = re.compile(r"key-[0-9a-f]{16}")
_ATTEMPTS = 100


class StoredKey(ApiKey, frozen=True, kw_only=True):
    """A key's record: with its HMAC, and in nanoseconds when it was made, for the order of listings."""

    hmac: str
    made_ns: int

    def public(self) -> ApiKey:
        """What may be shown of it."""
        return ApiKey(id=self.id, tenant=self.tenant, created_at=self.created_at, hint=self.hint)


class TenantStore:
    """All tenants. The tenant ``default`` always exists. Methods raise Unavailable without Redis."""

    def __init__(self, redis: Redis, keys: Keys, secret: bytes) -> None:
        self._redis = redis
        self._keys = keys
        self._secret = secret
        self._create = load_script(redis, "tenant_create")
        self._list = load_script(redis, "records_page")
        self._replace = load_script(redis, "tenant_replace")
        self._delete = load_script(redis, "tenant_delete")
        self._create_key = load_script(redis, "key_create")
        self._list_keys = load_script(redis, "key_list")
        self._revoke_key = load_script(redis, "key_revoke")

    async def create(self, name: str, limits: Mapping[str, float] | None = None) -> Tenant:
        """A new tenant. Raises InvalidRequest (bad name or limits), Conflict (it exists)."""
        check_tenant(name)
        tenant = Tenant(name=name, created_at=int(time.time()), limits=_checked(limits or {}))
        if name == DEFAULT_TENANT or not await self._put_new(tenant):
            raise Conflict(f"tenant {shown(name)} exists already", param="name")
        return tenant

    async def get(self, name: str) -> Tenant:
        """One tenant. Raises NotFound."""
        return msgspec.json.decode(await self._record(name), type=Tenant)

    async def weight(self, name: str) -> float:
        """The tenant's share of a busy engine, relative to others'; 1 unless its limits say otherwise. Raises NotFound."""
        return (await self.get(name)).limits.get(WEIGHT, 1.0)

    async def patch(self, name: str, limits: Mapping[str, float | None]) -> Tenant:
        """Set the given limits and remove those given as None; the others stay.

        Raises InvalidRequest (bad limits), NotFound.
        """
        new = _checked({limit: value for limit, value in limits.items() if value is not None})
        for _ in range(_ATTEMPTS):
            record = await self._record(name)
            tenant = msgspec.json.decode(record, type=Tenant)
            merged = {k: v for k, v in (tenant.limits | new).items() if k in new or k not in limits}
            tenant = msgspec.structs.replace(tenant, limits=merged)
            args = [name, record, msgspec.json.encode(tenant)]
            if await self._replace(keys=[self._keys.tenants], args=args):
                return tenant
        raise Unavailable(f"tenant {shown(name)} is being changed by too many at once")

    async def delete(self, name: str) -> list[str]:
        """Delete a tenant with its keys, deltas, tasks, files, jobs and remembered answers, all at once.

        Gives the digests that no version of any tenant refers to any more. Raises NotFound, and Conflict for
        ``default``.
        """
        if name == DEFAULT_TENANT:
            raise Conflict(f"tenant {shown(name)} cannot be deleted", param="name")
        keys = self._keys
        gone = None
        if is_tenant(name):
            gone = await self._delete(
                keys=[
                    keys.tenants,
                    keys.tenant_order,
                    keys.api_keys,
                    keys.tenant_keys(name),
                    keys.names(name),
                    keys.digests,
                    keys.quarantined,
                    keys.counts,
                    keys.idempotency_index(name),
                    keys.tasks(name),
                    keys.task_order(name),
                    keys.pins,
                    keys.files(name),
                    keys.file_order(name),
                    keys.file_owners,
                    keys.jobs(name),
                    keys.job_states,
                    keys.job_leases,
                    keys.job_ring,
                    keys.job_queue(name),
                    keys.jobs_active(name),
                ],
                args=[name, keys.delta(name, ""), keys.job("")],
            )
        if gone is None:
            raise _no_tenant(name)
        return [as_text(digest) for digest in gone]

    async def create_key(self, tenant: str) -> tuple[ApiKey, str]:
        """A new key of the tenant, and its text, which nobody can ever read again. Raises NotFound."""
        plaintext = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        now = time.time_ns()
        key = StoredKey(
            id=f"key-{secrets.token_hex(8)}",
            tenant=tenant,
            created_at=now // 1_000_000_000,
            hint=plaintext[-4:],
            hmac=self._hmac(plaintext),
            made_ns=now,
        )
        await self._record(tenant)  # Makes the tenant `default` if need be.
        made = await self._create_key(
            keys=[self._keys.tenants, self._keys.api_keys, self._keys.tenant_keys(tenant)],
            args=[tenant, key.id, key.hmac, msgspec.json.encode(key)],
        )
        if not made:
            raise _no_tenant(tenant)
        return key.public(), plaintext

    async def list_keys(self, tenant: str) -> list[ApiKey]:
        """The tenant's keys, oldest first, without their secrets. Raises NotFound."""
        await self._record(tenant)
        records = await self._list_keys(
            keys=[self._keys.tenants, self._keys.api_keys, self._keys.tenant_keys(tenant)], args=[tenant]
        )
        if records is None:
            raise _no_tenant(tenant)
        found = [msgspec.json.decode(record, type=StoredKey) for record in records]
        return [key.public() for key in sorted(found, key=lambda key: (key.made_ns, key.id))]

    async def revoke_key(self, tenant: str, key_id: str) -> None:
        """Remove a key at once. Raises NotFound, also when it is another tenant's."""
        known = (
            is_tenant(tenant)
            and _KEY_ID.fullmatch(key_id)
            and await self._revoke_key(
                keys=[self._keys.api_keys, self._keys.tenant_keys(tenant)], args=[key_id]
            )
        )
        if not known:
            raise NotFound(f"tenant {shown(tenant)} has no key {shown(key_id)}", param="id")

    async def find_key(self, plaintext: str) -> Principal | None:
        """Who holds this key; None when nobody does."""
        if not plaintext.startswith(KEY_PREFIX) or len(plaintext) > _LONGEST_KEY:
            return None
        wanted = self._hmac(plaintext)
        record = await self._redis.hget(self._keys.api_keys, wanted)
        if record is None:
            return None
        key = msgspec.json.decode(record, type=StoredKey)
        # The lookup is by a value that a stranger cannot steer; the comparison leaks nothing either.
        if not hmac.compare_digest(key.hmac, wanted):
            return None
        return Principal(tenant=key.tenant, key_id=key.id)

    async def list(self, after: str | None = None, limit: int = 20) -> Page:
        """A page of tenants, oldest first, ``default`` among them.

        ``after`` is the last name of the page before.
        Raises InvalidRequest when ``after`` is gone or ``limit`` is out of range.
        """
        check_limit(limit)
        await self._record(DEFAULT_TENANT)
        rows = None
        if after is None or is_tenant(after):
            keys = [self._keys.tenants, self._keys.tenant_order]
            rows = await self._list(keys=keys, args=[after or "", limit])
        if rows is None:
            raise InvalidRequest(f"there is no tenant {shown(after or '')} to go on after", param="after")
        items = [msgspec.json.decode(row, type=Tenant) for row in rows[1:]]
        return Page(items=items, has_more=bool(rows[0]))

    async def _record(self, name: str) -> bytes | str:
        """The tenant's stored record; ``default`` is made when it is missing. Raises NotFound."""
        if not is_tenant(name):
            raise _no_tenant(name)
        record = await self._redis.hget(self._keys.tenants, name)
        if record is None and name == DEFAULT_TENANT:
            await self._put_new(Tenant(name=name, created_at=int(time.time())))
            record = await self._redis.hget(self._keys.tenants, name)
        if record is None:
            raise _no_tenant(name)
        return record

    async def _put_new(self, tenant: Tenant) -> bool:
        keys = [self._keys.tenants, self._keys.tenant_order, self._keys.counts]
        return bool(await self._create(keys=keys, args=[tenant.name, msgspec.json.encode(tenant)]))

    def _hmac(self, plaintext: str) -> str:
        return hmac.new(self._secret, plaintext.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _checked(limits: Mapping[str, float]) -> dict[str, float]:
    """The limits as they are stored. Raises InvalidRequest."""
    for name, value in limits.items():
        if not _LIMIT_NAME.fullmatch(name):
            raise InvalidRequest(f"{shown(name)} is not the name of a limit", param="limits")
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"the limit {name} must be a number of at least 0", param=f"limits.{name}")
        if name == WEIGHT and not SMALLEST_WEIGHT <= value <= LARGEST_WEIGHT:
            raise InvalidRequest(
                f"the weight must be between {SMALLEST_WEIGHT:g} and {LARGEST_WEIGHT:g}; 1 is an ordinary share",
                param=f"limits.{WEIGHT}",
            )
    return {name: float(value) for name, value in limits.items()}


def _no_tenant(name: str) -> NotFound:
    return NotFound(f"tenant {shown(name)} does not exist", param="tenant")
