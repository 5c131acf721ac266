"""Text completions: rows for a request, and OpenAI's answer objects from what the rows give."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from server.api import kinds, prompts
from server.api.generation import Generation, Piece, Row
from server.api.logprobs import CompletionLogprobs
from server.api.schemas import CompletionRequest
from server.api.services import Backbone
from server.api.usage import Usage
from server.types import TokenLogprob

DEFAULT_MAX_TOKENS = 16


async def rows_for(request: CompletionRequest, backbone: Backbone) -> list[Row]:
    """``n`` rows for each prompt, prompt by prompt. Raises ``ContextTooLong``, ``InvalidRequest``."""
    kinds.echoes(backbone, request.echo)
    wanted = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    scored = request.logprobs if request.echo else None
    rows: list[Row] = []
    for item in request.prompt:
        if isinstance(item, str):
            given = await prompts.encode(backbone.tokenizer, item)
        else:
            prompts.check_ids(item, backbone, "prompt")
            given = item
        start = prompts.start(given, backbone, "prompt")
        for copy in range(request.n or 1):
            params = prompts.sampling(
                request,
                backbone,
                max_tokens=max(1, min(wanted, start.room)),
                copy=copy,
                logprobs=request.logprobs,
                prompt_logprobs=scored,
            )
            rows.append(
                Row(
                    len(rows),
                    start.prompt,
                    params,
                    request.stop or (),
                    continues=not start.source,
                    discard_output=wanted == 0,
                    source=start.source,
                )
            )
    return rows


class CompletionAnswer:
    """Formats one request's answer. ``head`` holds id, created, model and fingerprint."""

    def __init__(
        self, request: CompletionRequest, rows: Sequence[Row], generation: Generation, head: dict[str, Any]
    ) -> None:
        self._request = request
        self._rows = rows
        self._generation = generation
        self._head = {**head, "object": "text_completion"}
        self._usage = Usage(sum(len(row.given) for row in rows[:: request.n or 1]), copies=request.n or 1)
        self._opened: set[int] = set()
        self._logprobs = [CompletionLogprobs(request.logprobs or 0, generation.tokenizer) for _ in rows]

    async def whole(self) -> dict[str, Any]:
        """The ``text_completion`` object."""
        pieces = await self._generation.collect(self._rows)
        for piece in pieces:
            self._usage.add(piece)
        choices = [self._choice(piece) for piece in pieces]
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        async with aclosing(self._generation.stream(self._rows)) as pieces:
            async for piece in pieces:
                self._usage.add(piece)
                chunk = {**self._head, "choices": [self._choice(piece)]}
                yield {**chunk, "usage": None} if with_usage else chunk
        if with_usage:
            yield {**self._head, "choices": [], "usage": self._usage.body()}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        first = piece.index not in self._opened
        self._opened.add(piece.index)
        text, token_ids = piece.text, piece.token_ids
        logprobs: list[TokenLogprob | None] = [*piece.logprobs]
        row = self._rows[piece.index]
        if first and self._request.echo:
            text = self._prompt_text(row) + text
            if self._request.logprobs is not None:
                token_ids = [*row.prompt, *token_ids]
                logprobs = [*(piece.prompt_logprobs or [None] * len(row.prompt)), *logprobs]
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if self._request.logprobs is not None:
            choice["logprobs"] = self._logprobs[piece.index].format(token_ids, logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
            choice["prompt_token_ids"] = row.given if first else None
        return choice

    def _prompt_text(self, row: Row) -> str:
        given = self._request.prompt[row.index // (self._request.n or 1)]
        return given if isinstance(given, str) else self._generation.tokenizer.decode(given)
