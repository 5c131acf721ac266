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
    PinTier,
    ProbeResult,
    Residence,
    SamplingParams,
    Tier,
    TokenEvent,
    Vector,
    Want,
)


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """A row to run. ``id`` is the client's, unique while it lives.

    ``source`` is what an encoder-decoder's encoder reads; ``prompt`` then is how its decoder begins. ``weight`` is the
    tenant's share from now on, ``priority`` the row's among its tenant's (lower goes first).
    """

    id: int
    tenant: str
    prompt: list[int]
    delta: DeltaRef | None
    sampling: SamplingParams
    source: list[int] = []
    weight: float = 1.0
    priority: int = 0


class Encode(msgspec.Struct, tag="encode", frozen=True):
    """Rows for an encoder, by id, and what they shall become. ``weight`` and ``priority`` as in ``Submit``."""

    tenant: str
    rows: list[tuple[int, EncoderInput]]
    delta: DeltaRef | None
    want: Want
    weight: float = 1.0
    priority: int = 0


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


class Place(msgspec.Struct, tag="place", frozen=True):
    """Bring a delta to a tier now, and from then on keep it where ``pin`` says. Answered by ``Resides`` or ``Failed``.

    ``pin`` replaces the digest's pin (None: there is none); it changes nothing where the answer is ``Failed``. ``tier``
    is not below it.
    """

    id: int
    delta: DeltaRef
    tier: Tier
    pin: PinTier | None


class Pin(msgspec.Struct, tag="pin", frozen=True):
    """From now on keep a delta in this tier if it is there, or let it go (None). Not answered."""

    digest: str
    tier: PinTier | None


class Where(msgspec.Struct, tag="where", frozen=True):
    """Which tier is a delta in? Answered by ``Resides``."""

    id: int
    digest: str


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


class Resides(msgspec.Struct, tag="resides", frozen=True):
    """Answer to ``Place`` and ``Where``: where the delta is now. Running rows can keep it above the tier asked for."""

    id: int
    residence: Residence


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """A row, a load or a placement that ended in an error. ``code`` is one of the codes in ``server/errors.py``."""

    id: int
    code: str
    message: str


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """The engine cannot start (a bad backbone, no memory); restarting would not help."""

    message: str


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """Gauges and counts."""

    stats: EngineStats


Request = Submit | Encode | Cancel | Drop | Load | Place | Pin | Where
Reply = Ready | Progress | Step | Encoded | Loaded | Resides | Failed | Fatal | Stats

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 28
