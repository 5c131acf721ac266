"""What datasets need of the backbone's tokenizer (``server/engine/tokenizer.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from server.types import EncodedText, TextPiece


class Tokenizer(Protocol):
    """The backbone's own tokenizer and chat template, as serving uses them."""

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    @property
    def end_token(self) -> int | None:
        """What ends a text that is learnt."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_within(self, text: str, limit: int) -> list[int]: ...

    def encode_pieces(
        self, texts: Sequence[Sequence[TextPiece]], limit: int | None = None, add_special_tokens: bool = True
    ) -> EncodedText: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]: ...
