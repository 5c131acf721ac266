"""What prompts are made of: seeded random tokens and words, or the lines of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_COMMON = """
a all and any as at away back be before big blue book by call can come day do down each end even
every eye far find first for from give go good great hand have head help here high home house how if
in into it keep know land last left let life light line little long look make many men more most
move much must name near new next night no not now of off old on one only open or other our out over
own page part people place plant point right room round run sea see set she side small so some sound
stand still stop such sun take tell ten than that the then there they thing this time to tree turn
two under up use very voice walk want warm watch water way we well what when where white who why
will wind with word work world year yes you
"""
WORDS = _COMMON.split()


@dataclass(frozen=True)
class Lengths:
    """A range of token counts, both ends in it."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """``128``, or ``64:256``. Raises ValueError."""
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high) if colon else int(low))
        except ValueError:
            raise ValueError(f"'{text}' is neither a number nor LOW:HIGH") from None
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"'{text}': give 1 or more, and the smaller number first")
        return lengths

    def draw(self, chance: random.Random) -> int:
        """One of them, all equally likely."""
        return chance.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class Prompts:
    """Draws prompts. ``token_ids`` are what token prompts consist of; ``texts``, if any, go before all drawing."""

    lengths: Lengths
    token_ids: Sequence[int]
    texts: Sequence[str] = ()

    def prompt(self, index: int, chance: random.Random) -> str | list[int]:
        """For routes that take token ids: exactly as many as drawn. With ``texts``, the one of ``index``, in turn."""
        if self.texts:
            return self.texts[index % len(self.texts)]
        return chance.choices(self.token_ids, k=self.lengths.draw(chance))

    def text(self, index: int, chance: random.Random) -> str:
        """For routes that take text only: as many common words as drawn, which is about as many tokens."""
        if self.texts:
            return self.texts[index % len(self.texts)]
        return " ".join(chance.choices(WORDS, k=self.lengths.draw(chance)))


def read_texts(path: Path) -> list[str]:
    """The prompts of a JSONL file: an object with a text ``prompt`` on each line; empty lines are passed over.

    Raises ValueError naming the line, and OSError.
    """
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
        text = item.get("prompt") if isinstance(item, dict) else None
        if not isinstance(text, str) or not text:
            raise ValueError(f'{path}, line {number}: give an object with a text: {{"prompt": "..."}}')
        texts.append(text)
    if not texts:
        raise ValueError(f"{path} holds no prompts")
    return texts
