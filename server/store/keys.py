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
``files``                                  hash    file id -> its tenant
``t:TENANT:files``                         hash    file id -> its JSON record
``t:TENANT:files:order``                   zset    file id, scored by serial number: oldest first
``t:TENANT:jobs``                          zset    tuning job id, scored by serial number: oldest first
``t:TENANT:idem``                          zset    idempotency key names, scored by expiry (Unix seconds)
``t:TENANT:idem:HASH``                     string  one remembered answer; expires by itself
``jobs:states``                            hash    state -> how many tuning jobs of all tenants are in it
``jobs:leases``                            zset    id of a job that is worked on, scored by its lease's end (Unix seconds)
``jobs:ring``                              list    tenants with queued jobs, whose turn is next first
``jobs:queue:TENANT``                      zset    id of a queued job, scored by its serial number
``jobs:active:TENANT``                     set     ids of jobs that have not ended
``job:ID``                                 hash    one tuning job: see below
``job:ID:events``                          stream  its events, entry ``N-0``: field ``e``, JSON
``job:ID:checkpoints``                     hash    step -> JSON of the checkpoint
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

The fields of ``job:ID``:

================  ==============================================================
``tenant``        its owner
``serial``        its serial number
``status``        its state, one of ``server.store.jobs.STATES``
``token``         the fencing token: only its holder may write; it grows with every claim and every cancellation
``owner``         who holds the lease
``wish``          ``pause`` while somebody wants the running job paused, else empty
``events``        the number of its last event
``fixed``         JSON of what is known from the beginning and never changes
``spec``          JSON of the ``JobSpec``, once it is validated
``progress``      JSON of how far it has come, written by its worker
``error``         JSON of why it failed
``model``         the published delta's name
``results``       JSON list of result files' ids
``finished_at``   when it ended, Unix seconds
================  ==============================================================

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
        self.file_owners = f"{prefix}:files"
        self.job_states = f"{prefix}:jobs:states"
        self.job_leases = f"{prefix}:jobs:leases"
        self.job_ring = f"{prefix}:jobs:ring"

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

    def files(self, tenant: str) -> str:
        """The tenant's files: id -> record."""
        return f"{self.prefix}:t:{tenant}:files"

    def file_order(self, tenant: str) -> str:
        """The tenant's file ids, oldest first."""
        return f"{self.prefix}:t:{tenant}:files:order"

    def jobs(self, tenant: str) -> str:
        """The tenant's tuning jobs, oldest first."""
        return f"{self.prefix}:t:{tenant}:jobs"

    def job_queue(self, tenant: str) -> str:
        """The tenant's queued jobs, oldest first."""
        return f"{self.prefix}:jobs:queue:{tenant}"

    def jobs_active(self, tenant: str) -> str:
        """The tenant's jobs that have not ended."""
        return f"{self.prefix}:jobs:active:{tenant}"

    def job(self, job_id: str) -> str:
        """One tuning job."""
        return f"{self.prefix}:job:{job_id}"

    def job_events(self, job_id: str) -> str:
        """A tuning job's events."""
        return f"{self.prefix}:job:{job_id}:events"

    def job_checkpoints(self, job_id: str) -> str:
        """A tuning job's checkpoints: step -> record."""
        return f"{self.prefix}:job:{job_id}:checkpoints"

    def of_job(self, tenant: str, job_id: str) -> list[str]:
        """All keys that change with one job, in the order that ``job_common.lua`` takes them."""
        return [
            self.job(job_id),
            self.job_events(job_id),
            self.job_checkpoints(job_id),
            self.job_states,
            self.job_leases,
            self.job_ring,
            self.job_queue(tenant),
            self.jobs_active(tenant),
        ]

    def idempotency_index(self, tenant: str) -> str:
        """The tenant's remembered answers, by expiry."""
        return f"{self.prefix}:t:{tenant}:idem"

    def idempotency(self, tenant: str, route: str, key: str) -> str:
        """One remembered answer. ``route`` and ``key`` are free text, so they are hashed."""
        text = f"{len(route)}:{route}{key}".encode("utf-8", "surrogatepass")
        return f"{self.prefix}:t:{tenant}:idem:{hashlib.sha256(text).hexdigest()}"
