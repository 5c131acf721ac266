"""What a delta answers by itself: greedy decoding by training's own passes, which keep no keys and values.

An answer is guessed whole, and a pass says which token it would give at every place behind what is before it. Up to the
first place where the two differ that is what greedy decoding gives, the pass's token there too; what it says behind is the
next guess (Santilli et al. 2023). So a pass settles a token of every row at least, and the first guess is the answer that
is wanted: a delta that has learnt it needs one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch

from deltas.bank import PackedDelta
from server.tuning.batches import batches
from server.tuning.forward import Generated, Part, Passes
from server.tuning.spec import Example

MOST_ROWS = 32  # the first of a validation set
MOST_TOKENS = 64  # of an answer; what is wanted is cut there too


@torch.no_grad()
def greedy(
    passes: Passes, examples: Sequence[Example], delta: PackedDelta, ends: AbstractSet[int]
) -> list[tuple[list[int], list[int]]]:
    """Of each of the first rows the answer that is wanted and the one that is given, without the tokens that end them.

    Of a row with several answers it is the last one, behind all before it.
    """
    answers = [_Answer(example, passes, delta, ends) for example in examples[:MOST_ROWS]]
    while left := [(answer, answer.example()) for answer in answers if not answer.done]:
        for batch in batches(left, lambda row: len(row[1].tokens) + len(row[1].target)):
            (output,) = passes([Part("generate", [example for _, example in batch], delta)])
            if not isinstance(output, Generated):
                raise TypeError("a part that generates came back without tokens")
            found = torch.split(output.likeliest, output.counts)
            for (answer, _), likeliest in zip(batch, found, strict=True):
                answer.take(likeliest.tolist())
    return [(answer.wanted, answer.found) for answer in answers]


class _Answer:
    """One row's. ``guess`` is right up to ``settled`` tokens."""

    def __init__(self, example: Example, passes: Passes, delta: PackedDelta, ends: AbstractSet[int]) -> None:
        self._apart = passes.backbone.spec.kind == "encoder-decoder"
        if self._apart:
            self._given, wanted, before = example.tokens, example.target, 0
        else:
            start, stop = example.learn[-1]
            start = max(start, 0 if delta.prompt is not None else 1)  # nothing predicts a row's first token
            self._given, wanted, before = example.tokens[:start], example.tokens[start:stop], start
        room = MOST_TOKENS if passes.positions is None else passes.positions - delta.shift - before
        self._most = min(MOST_TOKENS, room)
        self._ends = ends
        self.wanted = self._without_end(wanted[: self._most])
        self.guess = wanted[: self._most]
        self.settled = 0

    @property
    def done(self) -> bool:
        """Whether all of it is known."""
        known = self.guess[: self.settled]
        return self.settled == self._most or any(token in self._ends for token in known)

    @property
    def found(self) -> list[int]:
        """What is known of it."""
        return self._without_end(self.guess[: self.settled])

    def example(self) -> Example:
        """The guess as a row that is learnt."""
        if self._apart:
            return Example(self._given, target=self.guess)
        first = len(self._given)
        return Example([*self._given, *self.guess], learn=[(first, first + len(self.guess))])

    def take(self, likeliest: list[int]) -> None:
        """What a pass gives in each place of the guess."""
        at, last = self.settled, len(self.guess) - 1
        while at < last and self.guess[at] == likeliest[at]:
            at += 1
        self.guess = [*self.guess[: self.settled], *likeliest[self.settled :]]
        self.settled = at + 1
        if self.settled == len(self.guess):  # it goes on behind what was wanted
            more = min(self.settled, self._most - self.settled)
            self.guess += self.guess[-1:] * more

    def _without_end(self, tokens: list[int]) -> list[int]:
        end = next((at for at, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[:end]
