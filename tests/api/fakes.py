"""A deterministic stand-in for the engine process, and a byte-level tokenizer."""

from __future__ import annotations

import asyncio
import codecs
import queue
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    TokenLogprob,
    Turn,
    Vector,
    Want,
)

EOS = 256
VOCAB = 300
MAX_MODEL_LEN = 512
NAME = "tiny-llama"
CHANGES = ProbeResult("changes")

INFO = BackboneInfo(
    name=NAME,
    folder="",
    family="llama",
    revision="0123456789abcdef",
    dtype="float32",
    device="cpu",
    parameters=1000,
    max_model_len=MAX_MODEL_LEN,
    max_rows=64,
    eos_token_ids=[EOS],
)


class ByteDetokenizer:
    """UTF-8, byte by byte; special tokens have no text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(i for i in token_ids if i < 256))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """A token a byte; 256 ends a text."""

    eos_token_ids: Sequence[int] = (EOS,)
    end_token: int | None = EOS

    def __init__(self) -> None:
        self.contexts: list[list[int]] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_within(self, text: str, limit: int) -> list[int]:
        return self.encode(text)[:limit]

    mask_token: tuple[str, int] | None = None
    unknown_id: int | None = None

    def encode_pieces(
        self, texts: Sequence[Sequence[TextPiece]], limit: int | None = None, add_special_tokens: bool = True
    ) -> EncodedText:
        ids = self.encode("".join(piece.text for text in texts for piece in text))[:limit]
        return EncodedText(ids, None, [(n, n, n + 1) for n in range(len(ids))])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        ids = token_ids
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return self.encode(text + ("[assistant]" if add_generation_prompt else ""), False)

    def detokenizer(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> ByteDetokenizer:
        self.contexts.append([*context])
        return ByteDetokenizer()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id % 256])


@dataclass
class Call:
    """One row that the fake was asked for."""

    prompt: list[int]
    sampling: SamplingParams
    delta: DeltaRef | None
    turn: Turn


@dataclass
class FakeEngine:
    """Answers every prompt with ``reply`` and then EOS.

    While ``gated``, rows wait for ``gate``. After ``hang_after`` tokens a row waits for ever; after
    ``fail_after`` it raises ``failure``. ``started`` and ``ended`` get one item a row, from the server's
    thread.
    """

    reply: str = "Hello, world!"
    gated: bool = False
    hang_after: int | None = None
    fail_after: int | None = None
    failure: DeltaserveError | None = None
    load_failure: DeltaserveError | None = None
    probe: ProbeResult = CHANGES
    not_ready: str | None = None
    info: BackboneInfo | None = INFO
    restarts: int = 0
    on_stats: Callable[[EngineStats], None] | None = None
    on_ready: Callable[[], None] | None = None
    tiers: dict[str, Tier] = field(default_factory=dict)
    pins: dict[str, PinTier] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    started: queue.Queue[int] = field(default_factory=queue.Queue)
    ended: queue.Queue[int] = field(default_factory=queue.Queue)
    running: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def reset(self) -> None:
        """As new."""
        fresh = FakeEngine()
        for name in ("reply", "hang_after", "fail_after", "failure", "load_failure", "probe", "not_ready"):
            setattr(self, name, getattr(fresh, name))
        for name in ("calls", "dropped", "started", "ended", "tiers", "pins"):
            setattr(self, name, getattr(fresh, name))

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def wait_ready(self) -> BackboneInfo:
        return INFO

    async def encode(
        self, *, rows: Sequence[EncoderInput], delta: DeltaRef | None, want: Want, turn: Turn
    ) -> list[Vector | DeltaserveError]:
        return [Vector(array("f", [float(len(row.ids)), 1.0]).tobytes()) for row in rows]

    async def score(
        self,
        *,
        prompt: list[int],
        choices: Sequence[list[int]],
        delta: DeltaRef | None,
        turn: Turn,
        source: Sequence[int] = (),
    ) -> list[list[float]]:
        return [[-token / 256 for token in choice] for choice in choices]

    async def load(self, delta: DeltaRef) -> ProbeResult:
        if self.load_failure is not None:
            raise self.load_failure
        return self.probe

    async def place(self, delta: DeltaRef, tier: Tier, pin: PinTier | None) -> Residence:
        if self.load_failure is not None:
            raise self.load_failure
        self.tiers[delta.digest] = tier
        self.pin(delta.digest, pin)
        return await self.where(delta.digest)

    async def where(self, digest: str) -> Residence:
        tier = self.tiers.get(digest, "disk")
        return Residence(tier, 0 if tier == "disk" else 1000)

    def pin(self, digest: str, tier: PinTier | None) -> None:
        self.pins.pop(digest, None)
        if tier is not None:
            self.pins[digest] = tier

    def drop(self, digest: str) -> None:
        self.dropped.append(digest)
        self.pins.pop(digest, None)

    async def generate(
        self,
        *,
        prompt: list[int],
        sampling: SamplingParams,
        delta: DeltaRef | None,
        turn: Turn,
        source: Sequence[int] = (),
    ) -> AsyncGenerator[TokenEvent, None]:
        self.calls.append(Call(prompt, sampling, delta, turn))
        self.running += 1
        self.started.put(len(self.calls))
        try:
            prefix = "" if delta is None else f"<{delta.digest[:4]}>"
            tokens = [*(prefix + self.reply).encode(), EOS]
            if sampling.ignore_eos:
                tokens = (tokens[:-1] * sampling.max_tokens)[: sampling.max_tokens]
            for index, token in enumerate(tokens):
                await asyncio.sleep(0)
                if index == self.fail_after and self.failure is not None:
                    raise self.failure
                if self.gated:
                    await self.gate.wait()
                if index == self.hang_after:
                    await asyncio.Event().wait()
                yield self._event(index, token, prompt, sampling)
                if index + 1 >= sampling.max_tokens:
                    return
        finally:
            self.running -= 1
            self.ended.put(self.running)

    def _event(self, index: int, token: int, prompt: list[int], sampling: SamplingParams) -> TokenEvent:
        reason = None
        if token == EOS or token in sampling.stop_token_ids:
            reason = "stop"
        elif index + 1 >= sampling.max_tokens:
            reason = "length"
        logprobs = None if sampling.logprobs is None else [_logprob(token, sampling.logprobs)]
        scored = None
        if index == 0 and sampling.prompt_logprobs is not None:
            scored = [None, *(_logprob(i, sampling.prompt_logprobs) for i in prompt[1:])]
        return TokenEvent([token], logprobs, scored, reason)


def _logprob(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, [((token + i) % 256, -0.5 - i) for i in range(top)])
