"""Token counts of one request, as OpenAI's ``usage`` object."""

from __future__ import annotations

from typing import Any

from server.api.generation import Piece


class Usage:
    """Counts while pieces pass. A prompt counts once, however many rows it has."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._completion = 0
        self._cached = 0

    def add(self, piece: Piece) -> None:
        """Count one piece."""
        self._completion += len(piece.token_ids)
        self._cached += piece.cached_tokens

    def body(self) -> dict[str, Any]:
        """The ``usage`` object."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": min(self._cached, self._prompt)},
        }
