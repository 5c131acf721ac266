"""Which requests are sent, and when: drawn from a seed, so that the same options ask the same things."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.bench.prompts import Lengths, Prompts

PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
    "classify": "/classify",
}
STREAMED = ("completions", "chat")
POPULARITIES = {
    "distinct": "the models in turn, so that as many requests as there are models are all for different ones",
    "uniform": "each request for any model, all equally likely",
    "zipf": "the k-th model listed with a chance proportional to 1/k^S",
    "identical": "all requests for the first model listed",
    "skewed": "half of the requests for the first model listed, the others equally likely",
}


@dataclass(frozen=True)
class Task:
    """A named task of the server: its kind, and one input that its own example shows."""

    name: str
    kind: str
    example: str | Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A model to ask, or a task, by which its figures are grouped and through which endpoints it is asked."""

    model: str
    kind: str
    endpoints: tuple[str, ...]
    task: Task | None = None


@dataclass(frozen=True)
class Request:
    """One request: its groups, where it goes and its body; ``streamed`` ones answer by server-sent events."""

    kind: str
    endpoint: str
    model: str
    path: str
    body: Mapping[str, Any] = field(repr=False)
    streamed: bool


@dataclass(frozen=True)
class Plan:
    """What a run asks."""

    targets: Sequence[Target]
    popularity: str
    exponent: float
    prompts: Prompts
    new_tokens: Lengths
    seed: int

    def requests(self, part: str) -> Iterator[Request]:
        """Without end. Another ``part`` of a run (the warm-up) draws from a seed of its own."""
        chance = random.Random(f"{self.seed}/{part}")
        chosen = choices(self.popularity, len(self.targets), self.exponent, chance)
        for index, place in enumerate(chosen):
            target = self.targets[place]
            endpoint = chance.choice(target.endpoints)
            if target.task is None:
                yield self._of_model(target, endpoint, index, chance)
            else:
                yield self._of_task(target, target.task, endpoint, index, chance)

    def _of_model(self, target: Target, endpoint: str, index: int, chance: random.Random) -> Request:
        body: dict[str, Any] = {"model": target.model}
        if endpoint == "chat":
            body["messages"] = [{"role": "user", "content": self.prompts.text(index, chance)}]
        else:
            body["prompt" if endpoint in STREAMED else "input"] = self.prompts.prompt(index, chance)
        if endpoint in STREAMED:
            body |= self._greedy(chance)
            body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        return Request(target.kind, endpoint, target.model, PATHS[endpoint], body, endpoint in STREAMED)

    def _of_task(
        self, target: Target, task: Task, endpoint: str, index: int, chance: random.Random
    ) -> Request:
        given: Any
        if isinstance(task.example, str):
            given = self.prompts.text(index, chance)
        else:  # the text fields anew, the rest (a list of choices) as it is
            given = {
                name: self.prompts.text(index, chance) if isinstance(value, str) else value
                for name, value in task.example.items()
            }
        body = {"inputs": [given], "parameters": self._greedy(chance) if task.kind == "generate" else {}}
        return Request(target.kind, endpoint, target.model, f"/v1/tasks/{task.name}/infer", body, False)

    def _greedy(self, chance: random.Random) -> dict[str, Any]:
        """As many new tokens as drawn, neither more nor fewer."""
        return {"max_tokens": self.new_tokens.draw(chance), "ignore_eos": True, "temperature": 0}


def choices(popularity: str, models: int, exponent: float, chance: random.Random) -> Iterator[int]:
    """Places in a list of ``models``, without end, by a popularity of ``POPULARITIES``; ``exponent`` is zipf's."""
    places = range(models)
    if popularity == "distinct":
        return itertools.cycle(places)
    if popularity == "identical":
        return itertools.repeat(0)
    weights: list[float]
    if popularity == "uniform":
        weights = [1.0] * models
    elif popularity == "zipf":
        weights = [(place + 1) ** -exponent for place in places]
    elif popularity == "skewed":
        weights = [float(max(models - 1, 1))] + [1.0] * (models - 1)
    else:
        raise ValueError(f"no popularity '{popularity}': give one of {', '.join(POPULARITIES)}")
    sums = list(itertools.accumulate(weights))
    return _endless(lambda: chance.choices(places, cum_weights=sums)[0])


def _endless(draw: Callable[[], int]) -> Iterator[int]:
    while True:
        yield draw()


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """A Poisson process: the seconds from the start at which requests are due, ``rate`` a second, without end."""
    chance = random.Random(f"{seed}/arrivals")
    due = 0.0
    while True:
        due += chance.expovariate(rate)
        yield due
