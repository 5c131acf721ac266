"""The registry of deltas: tenant, name and version to digest, with aliases.

Each change is one Lua script, so it happens whole or not at all, whoever else is at work. A version's record
never changes but for its visibility; whether it is quarantined belongs to its digest.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis

from server.errors import InvalidRequest, ModelNotFound, NotFound, Unavailable
from server.store.connect import as_text, load_script
from server.store.delta_fields import DeltaFields
from server.store.job_records import JobEnding, StaleLease
from server.store.keys import Keys
from server.store.pins import Pins
from server.store.reference import (
    check_alias,
    check_name,
    is_alias,
    is_name,
    is_tenant,
    parse_reference,
    shown,
)
from server.types import DEFAULT_TENANT, LIVE, DeltaRecord, Page, Visibility

LARGEST_PAGE = 1000


class RegistryCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How much is registered, over all tenants. ``digests`` counts distinct contents."""

    names: int
    versions: int
    digests: int
    quarantined: int


class Registry:
    """All tenants' deltas. Methods raise Unavailable while Redis cannot be reached.

    ``tenant`` is the caller's own everywhere. Another tenant's private delta and one that does not exist give
    the same ModelNotFound.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._add = load_script(redis, "job_common", "delta_add")
        self._get = load_script(redis, "delta_get")
        self._versions = load_script(redis, "delta_versions")
        self._list = load_script(redis, "delta_list")
        self._alias = load_script(redis, "delta_alias")
        self._delete = load_script(redis, "delta_delete")
        self.pins = Pins(redis, keys)
        self._quarantine = load_script(redis, "digest_quarantine")

    async def add(
        self,
        tenant: str,
        name: str,
        fields: DeltaFields,
        *,
        visibility: Visibility | None = None,
        promote: bool = True,
        ending: JobEnding | None = None,
    ) -> tuple[DeltaRecord, bool]:
        """Register a version; the record, and whether it is new. The tuning job that made it succeeds with it (``ending``).

        The same digest under the same name is the version that is already there, with its record as it was;
        a given ``visibility``, and ``promote``, apply to it too. ``visibility`` None: private when new. The
        alias ``live`` moves with ``promote``, and always to the first version.

        Raises InvalidRequest (bad name), NotFound (no such tenant), StaleLease (the job is no longer its worker's).
        """
        check_name(name)
        keys = self._keys
        job_keys, job_args = ([], []) if ending is None else ending.parts(keys)
        reply = await self._add(
            keys=[
                keys.tenants,
                keys.names(tenant),
                keys.delta(tenant, name),
                keys.digests,
                keys.counts,
                keys.quarantined,
                *job_keys,
            ],
            args=[
                "" if tenant == DEFAULT_TENANT else tenant,
                name,
                fields.digest,
                msgspec.json.encode(fields),
                visibility or "",
                int(promote),
                *job_args,
            ],
        )
        if reply is None:
            raise NotFound(f"tenant {shown(tenant)} does not exist", param="tenant")
        if ending is not None and reply[0] == -1:
            raise StaleLease(ending.lease.job)
        return _record(tenant, name, reply[1:]), bool(reply[0])

    async def resolve(self, tenant: str, reference: str) -> DeltaRecord:
        """The version that a request's model name means.

        It is ``NAME``, ``NAME@3`` or ``NAME@ALIAS``; another tenant's public one is ``TENANT/NAME...``. A
        bare name is its ``live`` alias. A quarantined version is given too: look at ``status``.

        Raises ModelNotFound.
        """
        parsed = parse_reference(reference)
        if parsed is None:
            raise _no_model(reference)
        owner = parsed.tenant or tenant
        found = await self._read(
            owner, parsed.name, parsed.version, parsed.alias, public_only=owner != tenant
        )
        if found is None:
            raise _no_model(reference)
        return found

    async def get(self, tenant: str, name: str, version: int) -> DeltaRecord:
        """One version of the tenant's own delta. Raises ModelNotFound."""
        found = await self._read(tenant, name, version, LIVE, public_only=False)
        if found is None:
            raise _no_model(f"{name}@{version}")
        return found

    async def versions(self, tenant: str, name: str) -> list[DeltaRecord]:
        """All versions of the tenant's own delta, oldest first. Raises ModelNotFound."""
        rows = await self._versions(keys=[self._delta(tenant, name), self._keys.quarantined])
        if not rows:
            raise _no_model(name)
        return sorted((_record(tenant, name, row) for row in rows), key=lambda record: record.version)

    async def aliases(self, tenant: str, name: str) -> dict[str, int]:
        """The aliases of the tenant's own delta, ``live`` among them, by name. Raises ModelNotFound."""
        found = (await self.aliases_of(tenant, [name]))[name]
        if not found:
            raise _no_model(name)
        return found

    async def aliases_of(self, tenant: str, names: Sequence[str]) -> dict[str, dict[str, int]]:
        """``aliases`` for several deltas at once; an empty dict for one that does not exist."""
        found = {}
        for name in names:
            fields = await self._redis.hgetall(self._delta(tenant, name))
            texts = {as_text(field): value for field, value in fields.items()}
            found[name] = {k[2:]: int(v) for k, v in sorted(texts.items()) if k.startswith("a:")}
        return found

    async def set_alias(self, tenant: str, name: str, alias: str, version: int) -> None:
        """Point an alias (``live`` too) to a version, at once for everyone.

        Raises InvalidRequest (bad alias), ModelNotFound (no such delta or version).
        """
        check_alias(alias)
        if not await self._alias(keys=[self._delta(tenant, name)], args=[alias, version]):
            raise _no_model(f"{name}@{version}")

    async def delete(self, tenant: str, name: str, version: int | None = None) -> list[str]:
        """Delete one version of the tenant's own delta, or all (None).

        Aliases of a deleted version go too, but ``live`` moves to the newest one left. Gives the digests that
        no version of any tenant refers to any more. Raises ModelNotFound.
        """
        keys = self._keys
        gone = await self._delete(
            keys=[
                keys.names(tenant),
                self._delta(tenant, name),
                keys.digests,
                keys.quarantined,
                keys.counts,
                keys.pins,
            ],
            args=[name, "" if version is None else version, tenant],
        )
        if gone is None:
            raise _no_model(name if version is None else f"{name}@{version}")
        return [as_text(digest) for digest in gone]

    async def quarantine(self, digest: str, reason: str) -> bool:
        """Mark every version with this digest, of any tenant, as quarantined, those still to be uploaded too.

        It lasts until the last of them is deleted. True when the digest is newly marked; False when it was
        already, or when no version has it.
        """
        keys = [self._keys.digests, self._keys.quarantined]
        return bool(await self._quarantine(keys=keys, args=[digest, reason]))

    async def quarantine_reason(self, digest: str) -> str | None:
        """Why the digest is quarantined; None when it is not."""
        reason = await self._redis.hget(self._keys.quarantined, digest)
        return None if reason is None else as_text(reason)

    async def referenced(self, digest: str) -> bool:
        """Whether any version of any tenant has this digest."""
        return bool(await self._redis.hexists(self._keys.digests, digest))

    async def identity(self) -> str:
        """This registry's random name, made at the first call and kept with the data."""
        await self._redis.set(self._keys.identity, uuid.uuid4().hex, nx=True)
        name = await self._redis.get(self._keys.identity)
        if name is None:
            raise Unavailable("the registry does not keep what is written to it")
        return as_text(name)

    async def counts(self) -> RegistryCounts:
        """How much is registered, for metrics."""
        names, versions = await self._redis.hmget(self._keys.counts, ["names", "versions"])
        return RegistryCounts(
            names=int(names or 0),
            versions=int(versions or 0),
            digests=await self._redis.hlen(self._keys.digests),
            quarantined=await self._redis.hlen(self._keys.quarantined),
        )

    async def list(self, tenant: str, after: str | None = None, limit: int = 20) -> Page:
        """The tenant's own deltas, oldest name first; of each, the version that is ``live``.

        ``after`` is the name or the id of the last item of the page before. Raises InvalidRequest when it is
        gone, or when ``limit`` is not between 1 and LARGEST_PAGE.
        """
        check_limit(limit)
        name = "" if after is None else after.partition("@")[0]
        rows = None
        if after is None or is_name(name):
            prefix = self._keys.delta(tenant, "")
            rows = await self._list(
                keys=[self._keys.names(tenant), self._keys.quarantined], args=[prefix, name, limit]
            )
        if rows is None:
            raise InvalidRequest(f"there is no delta {shown(after or '')} to go on after", param="after")
        items = [_record(tenant, as_text(row[0]), row[1:]) for row in rows[1:]]
        return Page(items=items, has_more=bool(rows[0]))

    async def _read(
        self, owner: str, name: str, version: int | None, alias: str, *, public_only: bool
    ) -> DeltaRecord | None:
        if not (is_tenant(owner) and is_name(name) and is_alias(alias)):
            return None
        row = await self._get(
            keys=[self._keys.delta(owner, name), self._keys.quarantined],
            args=["" if version is None else version, alias, int(public_only)],
        )
        return None if row is None else _record(owner, name, row)

    def _delta(self, tenant: str, name: str) -> str:
        """The key of a delta that a caller named; a text that cannot be a name is one that does not exist."""
        if not is_name(name):
            raise _no_model(name)
        return self._keys.delta(tenant, name)


def check_limit(limit: int) -> None:
    """Raises InvalidRequest unless a page may be this long."""
    if not 1 <= limit <= LARGEST_PAGE:
        raise InvalidRequest(f"limit must be between 1 and {LARGEST_PAGE}, not {limit}", param="limit")


def _record(tenant: str, name: str, row: Sequence[Any]) -> DeltaRecord:
    """From a script's {version, JSON, public, the reason of its quarantine or nothing}."""
    version, text, public, reason = row
    fields = msgspec.structs.asdict(msgspec.json.decode(text, type=DeltaFields))
    return DeltaRecord(
        id=f"{name}@{version}",
        tenant=tenant,
        name=name,
        version=version,
        status="ready" if reason is None else "quarantined",
        status_reason=None if reason is None else as_text(reason),
        visibility="public" if public else "private",
        **fields,
    )


def _no_model(reference: str) -> ModelNotFound:
    return ModelNotFound(f"the model {shown(reference)} does not exist", param="model")
