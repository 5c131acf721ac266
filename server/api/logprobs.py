"""Log-probabilities in the two forms OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.ports import Tokenizer
from server.types import TokenLogprob

_LEAST = -9999.0  # JSON has no minus infinity


def chat_logprobs(logprobs: Sequence[TokenLogprob], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """``{"content": [{token, logprob, bytes, top_logprobs}]}``; ``top`` alternatives each."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = tokenizer.token_text(token), tokenizer.token_bytes(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(data)}

    content = []
    for item in logprobs:
        alternatives = [entry(token, value) for token, value in item.top[:top]]
        content.append({**entry(item.token, item.logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """``{tokens, token_logprobs, top_logprobs, text_offset}``; the offset goes on from piece to piece."""

    def __init__(self, top: int, tokenizer: Tokenizer) -> None:
        self._top = top
        self._tokenizer = tokenizer
        self._offset = 0

    def format(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """One piece's tokens. An entry of None (the prompt's first token) has no log-probability."""
        tokens: list[str] = []
        offsets: list[int] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token, item in zip(token_ids, logprobs, strict=True):
            text = self._tokenizer.token_text(token)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            chosen.append(None if item is None else max(item.logprob, _LEAST))
            tops.append(None if item is None else self._alternatives(item, text))
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _alternatives(self, item: TokenLogprob, text: str) -> dict[str, float]:
        """Best first; of two tokens with the same text the better one stays; the chosen one is always
        there.
        """
        found: dict[str, float] = {}
        for token, value in item.top[: self._top]:
            found.setdefault(self._tokenizer.token_text(token), max(value, _LEAST))
        found.setdefault(text, max(item.logprob, _LEAST))
        return found
