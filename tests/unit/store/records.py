"""What the tests of the store register."""

from __future__ import annotations

import hashlib

from server.store.delta_fields import DeltaFields


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fields(text: str, **changes: object) -> DeltaFields:
    """The fields of a delta whose content is ``text``."""
    values: dict[str, object] = {
        "digest": digest_of(text),
        "methods": ["lora"],
        "format": "peft",
        "backbone": "tiny",
        "parameters": 12,
        "bytes": 48,
        "rank": 8,
        "sites": ["layers.0.attn.q"],
        "created_at": 1_700_000_000,
    }
    return DeltaFields(**(values | changes))  # type: ignore[arg-type]
