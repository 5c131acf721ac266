"""What is registered of a delta, and how it is read off one."""

from __future__ import annotations

import time

import msgspec

from deltas import methods
from deltas.delta import Delta


class DeltaFields(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller knows of a new version, and what never changes about it. See ``DeltaRecord``."""

    digest: str
    methods: list[str]
    format: str
    backbone: str
    parameters: int
    bytes: int
    rank: int | None
    sites: list[str]
    task_kind: str | None = None
    labels: list[str] | None = None
    created_at: int
    metadata: dict[str, str] = {}


def fields_of(delta: Delta, backbone: str, metadata: dict[str, str]) -> DeltaFields:
    """The fields of a delta that is registered now. Blocking: its digest is computed."""
    head = next((component.config for component in delta.components if component.method == "head"), None)
    return DeltaFields(
        digest=delta.digest,
        methods=delta.methods,
        format=delta.format,
        backbone=backbone,
        parameters=delta.parameters,
        bytes=delta.nbytes,
        rank=methods.rank(delta),
        sites=sorted({site for component in delta.components for site in component.sites()}),
        task_kind=None if head is None else head["kind"],
        labels=None if head is None else head["labels"],
        created_at=int(time.time()),
        metadata=metadata,
    )
