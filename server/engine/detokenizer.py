"""Text of tokens as they come, in whole characters.

For the two kinds of tokenizers that language models use, byte-level ones and SentencePiece ones, every token
stands for fixed bytes. A text is its tokens' bytes one after another, and an incremental UTF-8 decoder holds
back what is not a character yet. For any other kind the text of a few tokens is compared with and without
the newest ones.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer as RustTokenizer

MARK = "\u2581"  # SentencePiece's space
REPLACEMENT = "\ufffd"
WINDOW = 8  # tokens compared, for a tokenizer of another kind

# How a tokenizer's decoder makes text of tokens: from byte-level characters; from pieces with SentencePiece's
# mark for a space, where the beginning of a text keeps all spaces, loses one, or loses its first token's.
Scheme = Literal["byte-level", "keep", "strip", "strip-token", "other"]


class Detokenizer(Protocol):
    """Turns one row's tokens into text. Not thread-safe: one row's tokens come in order."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain with these tokens: never a part of a character."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character stayed incomplete."""


class Pieces:
    """What each token stands for. Thread-safe: what is remembered never changes."""

    def __init__(self, tokenizer: RustTokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.scheme, self._byte_fallback = _scheme(tokenizer)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes in the middle of a text; empty for an id that nothing has."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def opening(self, token_id: int) -> bytes:
        """The token's bytes at the beginning of a text."""
        if self.scheme == "strip":
            return self.bytes_of(token_id).removeprefix(b" ")
        if self.scheme == "strip-token":
            return (self.tokenizer.id_to_token(token_id) or "").replace(MARK, "").encode()
        return self.bytes_of(token_id)

    def _find(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self.scheme == "byte-level":
            table = _byte_level_table()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return str(token).encode()  # an added token that is written as it is
        if self.scheme == "other":
            return str(self.tokenizer.decode([token_id], skip_special_tokens=False)).encode()
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(MARK, " ").encode()


class ByteDetokenizer:
    """For tokens that stand for bytes: O(1) a token."""

    def __init__(self, pieces: Pieces, skip_special_tokens: bool, context: Iterable[int]) -> None:
        self._pieces = pieces
        self._skipped = pieces.special if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = any(token_id not in self._skipped for token_id in context)

    def push(self, token_ids: Iterable[int]) -> str:
        found: list[bytes] = []
        for token_id in token_ids:
            if token_id in self._skipped:
                continue
            piece = self._pieces.bytes_of(token_id)
            if piece and not self._begun:
                piece = self._pieces.opening(token_id)
                self._begun = True
            found.append(piece)
        return self._decoder.decode(b"".join(found))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any tokenizer: decodes the last few tokens again and gives out what is new."""

    def __init__(self, pieces: Pieces, skip_special_tokens: bool, context: Iterable[int]) -> None:
        self._tokenizer = pieces.tokenizer
        self._skipped = pieces.special if skip_special_tokens else frozenset()
        self._ids = [token_id for token_id in context if token_id not in self._skipped][-WINDOW:]
        self._given = len(self._ids)  # the text of this many has been given out

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(self._push(token_id) for token_id in token_ids if token_id not in self._skipped)

    def flush(self) -> str:
        return self._give() if len(self._ids) > self._given else ""

    def _push(self, token_id: int) -> str:
        self._ids.append(token_id)
        waiting = len(self._ids) - self._given
        if waiting < WINDOW and self._text(self._ids).endswith(REPLACEMENT):
            return ""
        return self._give()

    def _give(self) -> str:
        new = self._text(self._ids)[len(self._text(self._ids[: self._given])) :]
        self._ids = self._ids[max(self._given, len(self._ids) - WINDOW) :]
        self._given = len(self._ids)
        return new

    def _text(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def detokenizer(pieces: Pieces, skip_special_tokens: bool, context: Iterable[int]) -> Detokenizer:
    """The detokenizer for these pieces' scheme."""
    kind = WindowDetokenizer if pieces.scheme == "other" else ByteDetokenizer
    return kind(pieces, skip_special_tokens, context)


def _scheme(tokenizer: RustTokenizer) -> tuple[Scheme, bool]:
    """How the tokenizer's decoder works, and whether tokens like ``<0xE4>`` are bytes."""
    if tokenizer.decoder is None:
        return "other", False
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return "byte-level", False
    if decoder["type"] == "Metaspace" and decoder["replacement"] == MARK:
        return ("keep" if decoder["prepend_scheme"] == "never" else "strip-token"), False
    if decoder["type"] != "Sequence":
        return "other", False
    steps = list(decoder["decoders"])
    space = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    strips, byte_fallback = strip in steps, {"type": "ByteFallback"} in steps
    known = [space, *([{"type": "ByteFallback"}] if byte_fallback else []), {"type": "Fuse"}]
    if steps != known + ([strip] if strips else []):
        return "other", False
    return ("strip" if strips else "keep"), byte_fallback


@cache
def _byte_level_table() -> dict[str, int]:
    """Byte-level BPE's characters: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + at): byte for at, byte in enumerate(others)}
