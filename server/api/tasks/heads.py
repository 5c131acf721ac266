"""What a delta's head makes of a row: a class, a number, or a label for every word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api import encoding
from server.api.schemas_tasks import CutParameters
from server.api.tasks.encoded import Encoded, EncodedWay
from server.api.tasks.ways import Output
from server.engine import spans
from server.errors import UnsupportedTask
from server.types import Want


def ranked(labels: Sequence[str], probabilities: Sequence[float]) -> Output:
    """The output of ``classify``."""
    best = max(range(len(labels)), key=probabilities.__getitem__)
    return {
        "label": labels[best],
        "score": probabilities[best],
        "scores": dict(zip(labels, probabilities, strict=True)),
    }


def names(given: Sequence[str] | None, outputs: int, model: str) -> Sequence[str]:
    """The labels of a head with so many outputs, numbered where nobody named them.

    Raises UnsupportedTask where there are labels for another number of outputs.
    """
    if given is not None and len(given) != outputs:
        raise UnsupportedTask(
            f"The head of '{model}' has {outputs} outputs, and there are labels for {len(given)}."
        )
    return given or encoding.numbered(outputs)


@dataclass(frozen=True)
class HeadValue(EncodedWay[CutParameters]):
    """``regress``: the one output of the delta's head."""

    model: str

    def want(self, parameters: CutParameters) -> Want:
        del parameters
        return Want("head")

    def show(self, row: Encoded) -> Output:
        return {"value": encoding.one_output(row.vector, self.model)}


@dataclass(frozen=True)
class HeadClass(EncodedWay[CutParameters]):
    """``classify`` by the delta's head: the softmax over its outputs."""

    model: str
    labels: Sequence[str] | None

    def want(self, parameters: CutParameters) -> Want:
        del parameters
        return Want("head")

    def show(self, row: Encoded) -> Output:
        outputs = encoding.floats(row.vector)
        return ranked(names(self.labels, len(outputs), self.model), encoding.softmax(outputs))


@dataclass(frozen=True)
class HeadTags(EncodedWay[CutParameters]):
    """``tag``: each word has the label of its first token, and words of one label make spans."""

    model: str
    labels: Sequence[str] | None

    def want(self, parameters: CutParameters) -> Want:
        del parameters
        return Want("tokens")

    def show(self, row: Encoded) -> Output:
        numbers = encoding.floats(row.vector)
        width = len(numbers) // row.vector.lines
        labels = names(self.labels, width, self.model)
        lines = [
            [] if word is None else encoding.softmax(numbers[n * width : (n + 1) * width])
            for n, word in enumerate(row.text.words)
        ]
        (original,) = row.values.values()
        return {"spans": spans.merged(spans.words(row.text.words, lines, labels), labels, original)}
