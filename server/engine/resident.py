"""A delta on the device, and what is counted of loading them."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltas.bank import PackedDelta


@dataclass(eq=False)
class Resident:
    """A delta on the device and how many running rows use it."""

    delta: PackedDelta
    references: int = 0


@dataclass
class Counts:
    """Cumulative, but for ``seconds``, which the reader empties."""

    from_host: int = 0
    from_disk: int = 0
    failures: int = 0
    seconds: list[float] = field(default_factory=list)
