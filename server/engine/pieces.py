"""Texts made of pieces, tokenized so that only their writer's own pieces can spell control tokens.

A task's template may hold ``[MASK]`` or ``<|end|>``; the values that clients put into it may not: there the same
characters are ordinary text. The tokenizer reads such characters with its control tokens switched off, and all else in
one go, so that a text without them has the tokens that it would have anywhere.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

from server.errors import InvalidRequest
from server.types import EncodedText, TextPiece

Word = tuple[int, int, int]


class PieceEncoder:
    """Works on a tokenizer that nobody changes; may be used from several threads at once.

    ``types``: whether the backbone reads token types. ``unknown`` is the id for what the tokenizer does not know.
    """

    def __init__(self, fast: RustTokenizer, *, types: bool, unknown: int | None) -> None:
        self._fast = fast
        self._types = types
        control = {id_: token for id_, token in fast.get_added_tokens_decoder().items() if token.special}
        self._control_ids = control.keys() - {unknown}
        longest_first = sorted((token.content for token in control.values()), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _plain(self) -> RustTokenizer:
        """The same tokenizer, to which control tokens are ordinary text."""
        plain = RustTokenizer.from_str(self._fast.to_str())
        plain.encode_special_tokens = True
        return plain

    def encode(
        self, texts: Sequence[Sequence[TextPiece]], limit: int | None = None, *, around: bool = True
    ) -> EncodedText:
        """One text, or two as a pair, with the tokenizer's control tokens ``around``.

        At most ``limit`` tokens: the end of the longer text is cut.

        Raises InvalidRequest for a text with half a surrogate pair, for one that the tokenizer's normalisation turns
        into a control token, and where ``limit`` has no room beside the control tokens.
        """
        given = [self._one(pieces) for pieces in texts]
        encodings = [encoding for encoding, _ in given]
        if limit is not None:
            self._cut(encodings, limit, around=around)
        pair = encodings[1] if len(encodings) == 2 else None
        whole = self._fast.post_process(encodings[0], pair, add_special_tokens=around)
        words: list[Word | None] = [None] * len(whole.ids)
        if pair is None:
            inside = [n for n, control in enumerate(whole.special_tokens_mask) if not control]
            for n, word in zip(inside, given[0][1][: len(inside)], strict=True):
                words[n] = word
        return EncodedText(whole.ids, whole.type_ids if self._types else None, words)

    def _cut(self, encodings: list[Encoding], limit: int, *, around: bool) -> None:
        control = self._fast.num_special_tokens_to_add(is_pair=len(encodings) == 2) if around else 0
        room = limit - control
        if room < len(encodings):
            raise InvalidRequest(
                f"a text of at most {limit} tokens has no room beside {control} control tokens",
                param="truncate_prompt_tokens",
            )
        lengths = [len(encoding.ids) for encoding in encodings]
        if sum(lengths) <= room:
            return
        longer = lengths.index(max(lengths))
        rest = 0
        if len(encodings) == 2:
            rest = min(lengths[1 - longer], room // 2)
            encodings[1 - longer].truncate(rest)
        encodings[longer].truncate(room - rest)

    def _one(self, pieces: Sequence[TextPiece]) -> tuple[Encoding, list[Word]]:
        """One text without control tokens around it, and its words."""
        encodings: list[Encoding] = []
        words: list[Word] = []
        own = [(at, at + len(piece.text)) for at, piece in _placed(pieces) if piece.own]
        for text, start, plainly in self._sections(pieces, own):
            found = self._tokens(text, plainly)
            base = 1 + max((word for word, _, _ in words), default=-1)
            last = base
            for id_, (begin, end), word in zip(found.ids, found.offsets, found.word_ids, strict=True):
                begin, end = begin + start, end + start
                if id_ in self._control_ids and not any(a < end and begin < b for a, b in own):
                    raise InvalidRequest(f"a text reads as the control token {self._fast.id_to_token(id_)!r}")
                last = last if word is None else base + word
                words.append((last, begin, end))
            encodings.append(found)
        return (encodings[0] if len(encodings) == 1 else Encoding.merge(encodings)), words

    def _sections(
        self, pieces: Sequence[TextPiece], own: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[str, int, bool]]:
        """(text, where it begins, whether control tokens are off): few texts have more than one."""
        text = "".join(piece.text for piece in pieces)
        at = 0
        for match in self._spelled.finditer(text):
            begin, end = match.span()
            if any(a <= begin and end <= b for a, b in own):
                continue
            if at < begin:
                yield text[at:begin], at, False
            yield text[begin:end], begin, True
            at = end
        if at < len(text) or not text:
            yield text[at:], at, False

    def _tokens(self, text: str, plainly: bool) -> Encoding:
        try:
            (found,) = (self._plain if plainly else self._fast).encode_batch([text], add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("the text is not valid Unicode") from error
        return found


def _placed(pieces: Sequence[TextPiece]) -> Iterator[tuple[int, TextPiece]]:
    """Pieces with the position at which each begins."""
    starts = itertools.accumulate((len(piece.text) for piece in pieces), initial=0)
    return zip(starts, pieces, strict=False)
