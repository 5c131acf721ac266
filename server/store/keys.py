"""All Redis key names. No other module spells one.

=========================================  ======  ================================================
key (after the prefix)                     type    content
=========================================  ======  ================================================
``identity``                               string  a random name of this registry, made once
``counts``                                 hash    ``names``, ``versions``: how many; ``serial``
``digests``                                hash    digest -> how many versions of any tenant refer to it
``quarantined``                            hash    digest -> reason
``pins``                                   hash    TENANT/NAME@VERSION -> TIER:DIGEST
``tenants``                                hash    tenant -> its JSON record
``tenants:order``                          zset    tenant, scored by serial number: oldest first
``keys``                                   hash    HMAC-SHA256 of a key, hex -> its JSON record
``t:TENANT:keys``                          hash    key id -> that HMAC
``t:TENANT:names``                         zset    delta name, scored by serial number: oldest first
``t:TENANT:name:NAME``                     hash    one delta: see below
``t:TENANT:tasks``                         hash    task name -> its JSON record
``t:TENANT:tasks:order``                   zset    task name, scored by serial number: oldest first
``t:TENANT:idem``                          zset    idempotency key names, scored by expiry (Unix seconds)
``t:TENANT:idem:HASH``                     string  one remembered answer; expires by itself
=========================================  ======  ================================================

The fields of ``t:TENANT:name:NAME``:

==================  ==============================================================
``n``               the last version number given out
``v:VERSION``       JSON of what never changes about that version
``g:VERSION``       its digest
``p:VERSION``       present when that version is public
``d:DIGEST``        the version with that digest
``a:ALIAS``         the version the alias points to; ``a:live`` is there while any version is
==================  ==============================================================

Neither tenants nor names may hold a colon, so no two objects share a key.
"""

from __future__ import annotations

import hashlib


class Keys:
    """Key names under one ``prefix``; servers with different prefixes can share a Redis."""

    def __init__(self, prefix: str = "deltaserve") -> None:
        self.prefix = prefix
        self.identity = f"{prefix}:identity"
        self.counts = f"{prefix}:counts"
        self.digests = f"{prefix}:digests"
        self.quarantined = f"{prefix}:quarantined"
        self.pins = f"{prefix}:pins"
        self.tenants = f"{prefix}:tenants"
        self.tenant_order = f"{prefix}:tenants:order"
        self.api_keys = f"{prefix}:keys"

    def tenant_keys(self, tenant: str) -> str:
        """The tenant's API keys: id -> HMAC."""
        return f"{self.prefix}:t:{tenant}:keys"

    def names(self, tenant: str) -> str:
        """The tenant's delta names, oldest first."""
        return f"{self.prefix}:t:{tenant}:names"

    def delta(self, tenant: str, name: str) -> str:
        """One delta of the tenant: versions, digests and aliases."""
        return f"{self.prefix}:t:{tenant}:name:{name}"

    def tasks(self, tenant: str) -> str:
        """The tenant's tasks: name -> record."""
        return f"{self.prefix}:t:{tenant}:tasks"

    def task_order(self, tenant: str) -> str:
        """The tenant's task names, oldest first."""
        return f"{self.prefix}:t:{tenant}:tasks:order"

    def idempotency_index(self, tenant: str) -> str:
        """The tenant's remembered answers, by expiry."""
        return f"{self.prefix}:t:{tenant}:idem"

    def idempotency(self, tenant: str, route: str, key: str) -> str:
        """One remembered answer. ``route`` and ``key`` are free text, so they are hashed."""
        text = f"{len(route)}:{route}{key}".encode("utf-8", "surrogatepass")
        return f"{self.prefix}:t:{tenant}:idem:{hashlib.sha256(text).hexdigest()}"
