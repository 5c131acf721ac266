"""Chat completions: rows for a request, and OpenAI's answer objects from what the rows give."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from server.api import prompts
from server.api.generation import Generation, Piece, Row
from server.api.logprobs import chat_logprobs
from server.api.schemas import ChatRequest
from server.api.services import Backbone
from server.api.usage import Usage


async def rows_for(request: ChatRequest, backbone: Backbone) -> list[Row]:
    """``n`` rows over the rendered messages. Raises ``ContextTooLong``, ``InvalidRequest``."""
    rendered = await prompts.render(backbone.tokenizer, [message.plain() for message in request.messages])
    start = prompts.start(rendered, backbone, "messages")
    wanted = request.max_completion_tokens or request.max_tokens or start.room
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return [
        Row(
            copy,
            start.prompt,
            prompts.sampling(
                request, backbone, max_tokens=min(wanted, start.room), copy=copy, logprobs=logprobs
            ),
            request.stop or (),
            source=start.source,
        )
        for copy in range(request.n or 1)
    ]


class ChatAnswer:
    """Formats one request's answer. ``head`` holds id, created, model and fingerprint."""

    def __init__(
        self, request: ChatRequest, rows: Sequence[Row], generation: Generation, head: dict[str, Any]
    ) -> None:
        self._request = request
        self._rows = rows
        self._generation = generation
        self._head = head
        self._usage = Usage(len(rows[0].given), copies=len(rows))

    async def whole(self) -> dict[str, Any]:
        """The ``chat.completion`` object."""
        pieces = await self._generation.collect(self._rows)
        for piece in pieces:
            self._usage.add(piece)
        answer: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(piece) for piece in pieces],
            "usage": self._usage.body(),
        }
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = self._rows[0].given
        return answer

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The ``chat.completion.chunk`` objects of a stream."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        opened: set[int] = set()
        async with aclosing(self._generation.stream(self._rows)) as pieces:
            async for piece in pieces:
                self._usage.add(piece)
                for chunk in self._chunks(piece, opened):
                    yield {**chunk, "usage": None} if with_usage else chunk
        if with_usage:
            yield {**self._chunk([]), "usage": self._usage.body()}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _chunks(self, piece: Piece, opened: set[int]) -> list[dict[str, Any]]:
        """A piece as chunks: the role first, then text, then the finish reason by itself."""
        chunks = []
        if piece.index not in opened:
            first = self._chunk([self._delta(piece.index, {"role": "assistant", "content": ""})])
            if self._request.return_token_ids and not opened:
                first["prompt_token_ids"] = self._rows[0].given
            opened.add(piece.index)
            chunks.append(first)
        if piece.text or piece.token_ids:
            choice = self._delta(piece.index, {"content": piece.text}, self._logprobs(piece))
            if self._request.return_token_ids:
                choice["token_ids"] = piece.token_ids
            chunks.append(self._chunk([choice]))
        if piece.finish_reason is not None:
            chunks.append(self._chunk([self._delta(piece.index, {}, None, piece.finish_reason)]))
        return chunks

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(piece.logprobs, self._request.top_logprobs or 0, self._generation.tokenizer)
