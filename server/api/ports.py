"""What the api needs of the engine and of the tokenizer, as protocols: routes are tested against small
stand-ins.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

from server.errors import DeltaserveError
from server.types import (
    BackboneInfo,
    DeltaRef,
    EncodedText,
    EncoderInput,
    EngineStats,
    PinTier,
    ProbeResult,
    Residence,
    SamplingParams,
    TextPiece,
    Tier,
    TokenEvent,
    Turn,
    Vector,
    Want,
)


class Detokenizer(Protocol):
    """Token ids in, text out, never half a character."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete; what may still change is kept back."""

    def flush(self) -> str:
        """The text still kept back, once no id follows."""


class Tokenizer(Protocol):
    """The backbone's own tokenizer and chat template."""

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    @property
    def end_token(self) -> int | None:
        """What ends a text that is learnt."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_within(self, text: str, limit: int) -> list[int]: ...

    @property
    def mask_token(self) -> tuple[str, int] | None:
        """The mask as it is written, and its id."""

    @property
    def unknown_id(self) -> int | None: ...

    def encode_pieces(
        self, texts: Sequence[Sequence[TextPiece]], limit: int | None = None, add_special_tokens: bool = True
    ) -> EncodedText:
        """One text, or two as a pair, in which only their writer's own pieces can spell control tokens."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The chat template applied to messages. Raises ``InvalidRequest`` where the template refuses."""

    def detokenizer(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> Detokenizer:
        """For one row. ``context`` is what its tokens follow, where they go on with its text."""

    def token_text(self, token_id: int) -> str:
        """One token's text; U+FFFD stands where it holds part of a character."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""


class Engine(Protocol):
    """The only door to the engine process (``server/engine/client.py``)."""

    on_stats: Callable[[EngineStats], None] | None
    on_ready: Callable[[], None] | None
    restarts: int

    @property
    def info(self) -> BackboneInfo | None: ...

    @property
    def not_ready(self) -> str | None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def wait_ready(self) -> BackboneInfo: ...

    def generate(
        self,
        *,
        prompt: list[int],
        sampling: SamplingParams,
        delta: DeltaRef | None,
        turn: Turn,
        source: Sequence[int] = (),
    ) -> AsyncGenerator[TokenEvent, None]: ...

    async def score(
        self,
        *,
        prompt: list[int],
        choices: Sequence[list[int]],
        delta: DeltaRef | None,
        turn: Turn,
        source: Sequence[int] = (),
    ) -> list[list[float]]: ...

    async def encode(
        self, *, rows: Sequence[EncoderInput], delta: DeltaRef | None, want: Want, turn: Turn
    ) -> list[Vector | DeltaserveError]: ...

    async def load(self, delta: DeltaRef) -> ProbeResult: ...

    async def place(self, delta: DeltaRef, tier: Tier, pin: PinTier | None) -> Residence: ...

    async def where(self, digest: str) -> Residence: ...

    def pin(self, digest: str, tier: PinTier | None) -> None: ...

    def drop(self, digest: str) -> None: ...
