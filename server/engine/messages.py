"""What the api process and the engine process say to each other: msgpack frames over a local socket.

Each frame is a 4-byte little-endian length and a msgpack-encoded tagged struct. The api process is the only
client. Every ``Submit`` is answered by zero or more ``Step`` entries and exactly one end: an event with a finish
reason, or ``Failed``; ``Cancel`` makes the end silent. Every row of an ``Encode`` is answered by an ``Encoded`` entry or
``Failed``.
"""

from __future__ import annotations

import msgspec

from server.types import (
    BackboneInfo,
    DeltaRef,
    EncoderInput,
    EngineStats,
    ProbeResult,
    SamplingParams,
    TokenEvent,
    Vector,
    Want,
)


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """A row to run. ``id`` is the client's, unique while it lives.

    ``source`` is what an encoder-decoder's encoder reads; ``prompt`` then is how its decoder begins.
    """

    id: int
    tenant: str
    prompt: list[int]
    delta: DeltaRef | None
    sampling: SamplingParams
    source: list[int] = []


class Encode(msgspec.Struct, tag="encode", frozen=True):
    """Rows for an encoder, by id, and what they shall become."""

    tenant: str
    rows: list[tuple[int, EncoderInput]]
    delta: DeltaRef | None
    want: Want


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Nobody waits for this row any more."""

    id: int


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Forget a delta, and every sum it is part of, in every tier, once no running row uses it."""

    digest: str


class Load(msgspec.Struct, tag="load", frozen=True):
    """Bring a delta onto the device and try it there. Answered by ``Loaded`` or ``Failed``."""

    id: int
    delta: DeltaRef


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The backbone is resident."""

    info: BackboneInfo


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """Why the engine is not ready yet."""

    reason: str


class Step(msgspec.Struct, tag="step", frozen=True):
    """One step's events, by row id."""

    events: list[tuple[int, TokenEvent]]


class Encoded(msgspec.Struct, tag="encoded", frozen=True):
    """What one step of an encoder gave, by row id."""

    rows: list[tuple[int, Vector]]


class Loaded(msgspec.Struct, tag="loaded", frozen=True):
    """Answer to ``Load``: the delta is on the device, and this is what it did there."""

    id: int
    probe: ProbeResult


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """A row or a load that ended in an error. ``code`` is one of the codes in ``server/errors.py``."""

    id: int
    code: str
    message: str


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """The engine cannot start (a bad backbone, no memory); restarting would not help."""

    message: str


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """Gauges and counts."""

    stats: EngineStats


Request = Submit | Encode | Cancel | Drop | Load
Reply = Ready | Progress | Step | Encoded | Loaded | Failed | Fatal | Stats

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 28
