"""From a label for every token to spans of the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

OUTSIDE = "O"
_PREFIXED = re.compile(r"([BIELSU])-(.+)", re.DOTALL)
_OPENING = frozenset("BSU")  # prefixes that begin a span whatever came before
_CLOSING = frozenset("ELSU")


@dataclass(frozen=True)
class Word:
    """A word, where it lies in the text (characters), its label and that label's probability."""

    start: int
    end: int
    label: str
    score: float


def words(
    tokens: Sequence[tuple[int, int, int] | None], lines: Sequence[Sequence[float]], labels: Sequence[str]
) -> Iterator[Word]:
    """Each word with the likeliest label of its first token, as taggers are trained: other tokens have no say.

    ``tokens`` as in :class:`server.types.EncodedText`, ``lines`` has each token's probabilities.
    """
    groups: dict[int, list[int]] = {}
    for at, token in enumerate(tokens):
        if token is not None:
            groups.setdefault(token[0], []).append(at)
    for members in groups.values():
        line = lines[members[0]]
        best = max(range(len(line)), key=line.__getitem__)
        places = [token for at in members if (token := tokens[at]) is not None]
        yield Word(min(p[1] for p in places), max(p[2] for p in places), labels[best], line[best])


def is_prefixed(labels: Iterable[str]) -> bool:
    """Whether every label but ``O`` has a prefix that says where a word is in its span."""
    return all(label == OUTSIDE or _PREFIXED.fullmatch(label) for label in labels)


def merged(found: Iterable[Word], labels: Iterable[str], text: str) -> list[dict[str, Any]]:
    """The spans of consecutive words; a span's score is the mean of its words'.

    Where every one of ``labels`` but ``O`` has a prefix ``B- I- E- L- S- U-``, prefixes say where spans begin and end:
    ``B``, ``S`` and ``U`` begin one; ``I``, ``E`` and ``L`` go on with one of their own label, or begin one where there
    is none; ``E``, ``L``, ``S`` and ``U`` end it. Else consecutive words of one label are one span. ``O`` ends a span
    and is in none.
    """
    prefixed = is_prefixed(labels)
    spans: list[tuple[str, list[Word]]] = []
    open_ = False
    for word in found:
        if word.label == OUTSIDE:
            open_ = False
            continue
        match = _PREFIXED.fullmatch(word.label) if prefixed else None
        prefix, label = (match[1], match[2]) if match else ("", word.label)
        if not open_ or prefix in _OPENING or spans[-1][0] != label:
            spans.append((label, []))
        spans[-1][1].append(word)
        open_ = prefix not in _CLOSING
    return [_span(label, those, text) for label, those in spans]


def _span(label: str, those: Sequence[Word], text: str) -> dict[str, Any]:
    start, end = those[0].start, those[-1].end
    while start < end and text[start].isspace():  # some tokenizers count the space before a word to it
        start += 1
    return {
        "start": start,
        "end": end,
        "label": label,
        "score": sum(word.score for word in those) / len(those),
    }
