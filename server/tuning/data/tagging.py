"""Labels of words from marked places of a text, in the scheme that the labels' names say."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from server.engine.spans import OUTSIDE, Word, is_prefixed, merged
from server.tuning.data.forms import Tagged

IGNORED = -100
_PREFIXES = "BIELSU"
# Where a word is in its span -> the prefixes that say so, best first.
_ONLY, _FIRST, _LAST, _INSIDE = "SUBI", "BI", "ELI", "IB"


def names_of(item: Tagged) -> Iterable[str]:
    """The labels that an item needs, where none are given: those of words, and of spans with B- and I-."""
    yield OUTSIDE
    for _, _, label in item.marks:
        if item.by_word:
            yield label
            if label.startswith(
                "B-"
            ):  # what goes on with it, where the tokenizer has more words than the row
                yield f"I-{label[2:]}"
        else:
            yield f"B-{label}"
            yield f"I-{label}"


class Scheme:
    """The labels of a tagger: with prefixes ``B- I- E- L- S- U-`` on all but ``O``, or without."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._numbers = {label: n for n, label in enumerate(labels)}
        self._prefixed = is_prefixed(labels)

    def unknown(self, item: Tagged) -> tuple[str, str] | None:
        """The first label that there is not, with the row's key that has it."""
        for n, (_, _, label) in enumerate(item.marks):
            known = label in self._numbers
            if self._prefixed and not item.by_word:
                known = any(f"{prefix}-{label}" in self._numbers for prefix in _PREFIXES)
            if not known:
                return label, f"tags[{n}]" if item.by_word else f"spans[{n}].label"
        return None

    def numbers(self, item: Tagged, words: Sequence[tuple[int, int, int] | None]) -> tuple[list[int], bool]:
        """A label's number for the first token of each word, -100 for all other tokens (``words`` as in
        :class:`server.types.EncodedText`); and whether a span's border is inside a word, all of which it takes then."""
        spans = self._spans(item)
        found = [IGNORED] * len(words)
        inside = False
        groups: dict[int, list[int]] = {}
        for at, token in enumerate(words):
            if token is not None:
                groups.setdefault(token[0], []).append(at)
        places: list[tuple[int, int, int]] = []  # first token, first character, end
        for members in groups.values():
            start, end = _trimmed(item.text, [token for at in members if (token := words[at]) is not None])
            places.append((members[0], start, end))
        ends = [end for _, end, _ in spans]
        of_words = [_owner(spans, ends, start, end) for _, start, end in places]
        for n, (at, start, end) in enumerate(places):
            owner = of_words[n]
            first = n == 0 or of_words[n - 1] != owner
            last = n + 1 == len(places) or of_words[n + 1] != owner
            found[at] = self._number(None if owner is None else spans[owner][2], first, last)
            if owner is not None:
                inside = inside or start < spans[owner][0] or end > spans[owner][1]
        return found, inside

    def _spans(self, item: Tagged) -> list[tuple[int, int, str]]:
        """Prefixed labels of words make spans as they do when they are served."""
        if not (item.by_word and self._prefixed):
            return [mark for mark in item.marks if mark[2] != OUTSIDE]
        given = (Word(*mark, 1.0) for mark in item.marks)
        return [(s["start"], s["end"], s["label"]) for s in merged(given, self._labels, item.text)]

    def _number(self, label: str | None, first: bool, last: bool) -> int:
        if label is None or not self._prefixed:
            return self._numbers.get(label or OUTSIDE, IGNORED)
        order = _ONLY if first and last else _FIRST if first else _LAST if last else _INSIDE
        wanted = (f"{prefix}-{label}" for prefix in order + _PREFIXES)
        return next(self._numbers[name] for name in wanted if name in self._numbers)


def _trimmed(text: str, tokens: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Where a word lies, without the spaces that some tokenizers count to it."""
    start, end = min(token[1] for token in tokens), max(token[2] for token in tokens)
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _owner(spans: Sequence[tuple[int, int, str]], ends: Sequence[int], start: int, end: int) -> int | None:
    """The first span that has a character of the word."""
    at = bisect_right(ends, start)
    return at if at < len(spans) and spans[at][0] < end else None
