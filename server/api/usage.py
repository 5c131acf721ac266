"""Token counts of one request, as OpenAI's ``usage`` object."""

from __future__ import annotations

from typing import Any

from server.api.generation import Piece


class Usage:
    """Counts while pieces pass. A prompt counts once, however many ``copies`` (rows one after another) it has, and what
    was cached of it is what its first row found: the others find what that one computed.
    """

    def __init__(self, prompt_tokens: int, copies: int = 1) -> None:
        self._prompt, self._copies = prompt_tokens, copies
        self._completion = 0
        self._cached = 0

    def add(self, piece: Piece) -> None:
        """Count one piece."""
        self._completion += len(piece.token_ids)
        if piece.index % self._copies == 0:
            self._cached += piece.cached_tokens

    def body(self) -> dict[str, Any]:
        """The ``usage`` object."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }
