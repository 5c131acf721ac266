"""From prompts to text: rows run concurrently on the engine, token ids become text, stop strings end rows.

Routes describe what they want as :class:`Row` and format what comes back; no route speaks to the engine
itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from server.api.ports import Engine, Tokenizer
from server.api.stops import StopFinder
from server.errors import RowFailed
from server.metrics import Metrics
from server.types import DeltaRef, FinishReason, SamplingParams, TokenEvent, TokenLogprob, Turn


@dataclass(frozen=True)
class Row:
    """One sequence to generate.

    ``continues``: its text goes on with the prompt's (a text completion, not a chat turn). ``discard_output`` runs
    it for its prompt's log-probabilities only. ``source`` is what an encoder-decoder's encoder reads.
    """

    index: int
    prompt: list[int]
    sampling: SamplingParams
    stops: Sequence[str] = ()
    continues: bool = False
    discard_output: bool = False
    source: list[int] = field(default_factory=list)

    @property
    def given(self) -> list[int]:
        """The tokens of what the caller sent."""
        return self.source or self.prompt


@dataclass
class Piece:
    """More of one row: text that is certain, and the tokens since the last piece. The last has a finish
    reason.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0

    def add(self, other: Piece) -> None:
        """Append a later piece of the same row."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs
        self.finish_reason = other.finish_reason
        self.cached_tokens += other.cached_tokens


@dataclass(frozen=True)
class Generation:
    """What one request's rows have in common. ``started`` is ``time.perf_counter()`` when the request
    came.
    """

    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    turn: Turn
    delta: DeltaRef | None
    started: float = field(default_factory=time.perf_counter)

    async def stream(self, rows: Sequence[Row]) -> AsyncGenerator[Piece, None]:
        """The rows' pieces as they come, all rows at once. Raises the first row's error; then no row goes on.

        Closing the generator frees every row.
        """
        if len(rows) == 1:
            async with aclosing(self._row(rows[0])) as pieces:
                async for piece in pieces:
                    yield piece
            return
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(row, queue)) for row in rows]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def collect(self, rows: Sequence[Row]) -> list[Piece]:
        """Each row in one piece, in the rows' order."""
        whole = {row.index: Piece(row.index) for row in rows}
        async with aclosing(self.stream(rows)) as pieces:
            async for piece in pieces:
                whole[piece.index].add(piece)
        return [whole[row.index] for row in rows]

    async def _pump(self, row: Row, queue: asyncio.Queue[Piece | BaseException | None]) -> None:
        try:
            async with aclosing(self._row(row)) as pieces:
                async for piece in pieces:
                    queue.put_nowait(piece)
        except Exception as error:  # noqa: BLE001 - handed to the reader of the queue, who raises it
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    async def _row(self, row: Row) -> AsyncGenerator[Piece, None]:
        text = _RowText(row, self.tokenizer)
        self.metrics.prompt_accepted(self.turn.tenant, len(row.given))
        last = 0.0
        events = self.engine.generate(
            prompt=row.prompt,
            sampling=row.sampling,
            delta=self.delta,
            turn=self.turn,
            source=row.source,
        )
        async with aclosing(events):
            async for event in events:
                if event.token_ids:
                    last = self._count(len(event.token_ids), last)
                piece = text.take(event)
                if piece is not None:
                    yield piece
                    if piece.finish_reason is not None:
                        return
        raise RowFailed("The engine ended this row without a result.")

    def _count(self, tokens: int, last: float) -> float:
        now = time.perf_counter()
        self.metrics.tokens_generated(self.turn.tenant, tokens)
        if last:
            self.metrics.next_tokens(now - last, tokens)
        else:
            self.metrics.first_token(now - self.started)
        return now


class _RowText:
    """One row's way from token ids to text that may be shown."""

    def __init__(self, row: Row, tokenizer: Tokenizer) -> None:
        self._row = row
        self._detokenizer = tokenizer.detokenizer(context=row.prompt if row.continues else ())
        self._finder = StopFinder(row.stops)
        self._silent = {*row.sampling.stop_token_ids}
        if not row.sampling.ignore_eos:
            self._silent.update(tokenizer.eos_token_ids)
        self._count = 0
        self._piece = Piece(row.index)

    def take(self, event: TokenEvent) -> Piece | None:
        """The piece that this event completes; None while its text is held back."""
        piece = self._piece
        piece.prompt_logprobs = piece.prompt_logprobs or event.prompt_logprobs
        piece.cached_tokens += event.cached_tokens
        for position, token in enumerate(event.token_ids):
            piece.token_ids.append(token)
            if event.logprobs is not None:
                piece.logprobs.append(event.logprobs[position])
            self._count += 1
            # the token that ends a row is not part of its text, also where it is an ordinary word
            ends = event.finish_reason == "stop" and position == len(event.token_ids) - 1
            if not (ends and token in self._silent):
                piece.text += self._show(self._detokenizer.push([token]))
            if self._finder.found is not None:
                return self._finish("stop")
        if event.finish_reason is not None:
            piece.text += self._show(self._detokenizer.flush())
            stopped = self._finder.found is not None
            if not stopped:
                piece.text += self._finder.flush()
            return self._finish("stop" if stopped else event.finish_reason)
        if piece.text or piece.prompt_logprobs is not None:
            self._piece = Piece(self._row.index)
            return self._visible(piece)
        return None

    def _show(self, text: str) -> str:
        if self._count < self._row.sampling.min_tokens:
            return self._finder.release(text)
        return self._finder.push(text)

    def _finish(self, reason: FinishReason) -> Piece:
        self._piece.finish_reason = reason
        return self._visible(self._piece)

    def _visible(self, piece: Piece) -> Piece:
        if not self._row.discard_output:
            return piece
        return Piece(
            piece.index,
            prompt_logprobs=piece.prompt_logprobs,
            finish_reason=None if piece.finish_reason is None else "length",
            cached_tokens=piece.cached_tokens,
        )
