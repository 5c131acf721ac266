"""Delta objects as the API shows them."""

from __future__ import annotations

from typing import Any

from server.types import DeltaRecord


def delta_object(record: DeltaRecord, aliases: dict[str, int]) -> dict[str, Any]:
    """The ``delta`` object of one version; ``aliases`` are its name's, of which its own are shown."""
    return {
        "id": record.id,
        "object": "delta",
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "methods": record.methods,
        "format": record.format,
        "backbone": record.backbone,
        "parameters": record.parameters,
        "bytes": record.bytes,
        "rank": record.rank,
        "sites": record.sites,
        "task_kind": record.task_kind,
        "labels": record.labels,
        "status": record.status,
        "status_reason": record.status_reason,
        "aliases": sorted(alias for alias, version in aliases.items() if version == record.version),
        "visibility": record.visibility,
        "created_at": record.created_at,
        "metadata": record.metadata,
    }
