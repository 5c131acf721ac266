"""Sentences for three small tasks, made from templates and words: what a delta is trained on, and what it never saw.

Templates and content words of the held-out sentences are not those of training, so a model that does well on them has
learnt the task and not the words.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

TRAINING, HELD_OUT = 160, 40  # sentences of a task at most


@dataclass(frozen=True)
class Example:
    """``target``: the index of a label, or a number for a regression."""

    text: str
    target: float


@dataclass(frozen=True)
class Task:
    """``labels`` are none for a regression."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """Templates with ``{word}`` and ``{thing}``, what stands for them, and the target of each word."""

    templates: Sequence[str]
    words: Mapping[str, float]
    things: Sequence[str] = ("",)

    def examples(self, most: int) -> tuple[Example, ...]:
        """Of all sentences as many as this, drawn alike on every machine."""
        made = [
            Example(template.format(word=word, thing=thing), target)
            for template, (word, target), thing in product(self.templates, self.words.items(), self.things)
        ]
        random.Random(0).shuffle(made)
        return tuple(made[:most])


def _task(training: _Part, held_out: _Part, labels: Iterable[str] = ()) -> Task:
    return Task(training.examples(TRAINING), held_out.examples(HELD_OUT), tuple(labels))


def _by_label(*groups: str) -> dict[str, float]:
    return {word: float(index) for index, words in enumerate(groups) for word in words.split(", ")}


SENTIMENT = _task(
    _Part(
        (
            "The {thing} was {word}.",
            "I thought the {thing} was {word} from start to end.",
            "Everyone said that our {thing} had been {word}.",
            "It is hard to imagine a {thing} that is more {word}.",
        ),
        _by_label(
            "terrible, dreadful, boring, awful, disappointing, horrible, annoying",
            "wonderful, delightful, excellent, charming, superb, brilliant, enjoyable",
        ),
        ("film", "meal", "hotel", "book", "concert"),
    ),
    _Part(
        (
            "Honestly, the {thing} turned out {word}.",
            "My friends found that {thing} {word}, and so did I.",
            "What they gave us was a {word} {thing}.",
        ),
        _by_label("miserable, dull, poor, unpleasant", "fantastic, lovely, splendid, beautiful"),
        ("play", "journey", "phone", "garden"),
    ),
    ("negative", "positive"),
)

TOPIC = _task(
    _Part(
        (
            "They talked about the {word} all evening.",
            "Nobody expected the {word} to matter so much.",
            "She wrote a long letter about the {word}.",
            "In the end it was the {word} that decided it.",
        ),
        _by_label(
            "striker, goalkeeper, referee, tournament, penalty, coach, match",
            "soup, oven, flour, recipe, garlic, sauce, stew",
            "storm, rain, snow, thunder, fog, sunshine, heat wave",
            "bank, loan, interest rate, shares, tax, mortgage, salary",
            "guitar, orchestra, melody, piano, choir, drummer, song",
        ),
    ),
    _Part(
        ("The article mentions the {word} twice.", "He asked me whether I remembered the {word}."),
        _by_label(
            "midfielder, football team, championship, athlete",
            "dough, frying pan, onion, dinner",
            "hail, drizzle, frost, blizzard",
            "investment, savings account, dividend, debt",
            "violin, singer, symphony, saxophone",
        ),
    ),
    ("sport", "cooking", "weather", "money", "music"),
)

INTENSITY = _task(
    _Part(
        (
            "The {thing} was {word}.",
            "By noon the {thing} had become {word}.",
            "She called the {thing} {word}.",
        ),
        {
            f"{degree} {quality}": value
            for degree, value in {
                "barely": 0.0,
                "slightly": 0.2,
                "somewhat": 0.35,
                "fairly": 0.5,
                "quite": 0.6,
                "very": 0.8,
                "extremely": 1.0,
            }.items()
            for quality in ("cold", "noisy", "bright", "heavy", "expensive")
        },
        ("room", "water", "machine"),
    ),
    _Part(
        ("I found the {thing} {word}.", "In winter that {thing} is {word}."),
        {
            f"{degree} {quality}": value
            for degree, value in {
                "barely": 0.0,
                "slightly": 0.2,
                "fairly": 0.5,
                "very": 0.8,
                "extremely": 1.0,
            }.items()
            for quality in ("wet", "slow", "dangerous", "dark")
        },
        ("road", "train"),
    ),
)
"""How much of something a sentence speaks of, from 0 to 1."""
