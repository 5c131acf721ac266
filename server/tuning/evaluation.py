"""A job's validation set through its delta as it would be stored: the loss and what its task is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from deltas.bank import PackedDelta
from server.tuning import losses, scores
from server.tuning.forward import Generated, Output, Part, Passes
from server.tuning.spec import Example, JobSpec, Task

STEP_TOKENS = 4096  # of a pass without gradients

METRICS: dict[Task, tuple[str, ...]] = {
    "generate": ("loss", "perplexity", "token_accuracy", "exact_match"),
    "classify": ("loss", "accuracy", "macro_f1", "matthews"),
    "regress": ("loss", "pearson", "spearman"),
    "tag": ("loss", "accuracy", "macro_f1", "span_f1"),
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


@dataclass
class _Answers:
    """What was wanted and what was found: a class's number or a value a row, or one class's number a counted token."""

    wanted: list[list[float]] = field(default_factory=list)  # one list a row
    found: list[list[float]] = field(default_factory=list)

    def flat(self) -> tuple[list[float], list[float]]:
        return [x for row in self.wanted for x in row], [x for row in self.found for x in row]


@torch.no_grad()
def evaluate(
    passes: Passes, spec: JobSpec, examples: Sequence[Example], delta: PackedDelta
) -> dict[str, float]:
    """The metrics of ``examples``, by name: those of the job's task."""
    total = weight = 0.0
    answers = _Answers()
    kind, before = passes.backbone.spec.kind, delta.prefix_length
    for chosen in _batches(examples):
        (output,) = passes([Part(spec.task, chosen, delta, spec.label_smoothing)])
        total += float(losses.total(spec, chosen, output))
        weight += losses.weight(spec, chosen, kind, before)
        _collect(spec.task, chosen, output, answers)
    loss = total / weight
    wanted, found = answers.flat()
    values: tuple[float, ...]
    match spec.task:
        case "generate":
            # a row of which every token is right, given those before it, is what greedy decoding answers
            whole = scores.exact_match(
                [tuple(row) for row in answers.wanted], [tuple(r) for r in answers.found]
            )
            values = (scores.perplexity(loss), scores.accuracy(wanted, found), whole)
        case "classify":
            values = tuple(
                score(wanted, found) for score in (scores.accuracy, scores.macro_f1, scores.matthews)
            )
        case "regress":
            values = (scores.pearson(wanted, found), scores.spearman(wanted, found))
        case "tag":
            values = (scores.accuracy(wanted, found), scores.macro_f1(wanted, found), _span_f1(spec, answers))
    return dict(zip(METRICS[spec.task], (loss, *values), strict=True))


def _collect(task: Task, examples: Sequence[Example], output: Output, answers: _Answers) -> None:
    if isinstance(output, Generated):
        for part in torch.split(output.right, output.counts):
            answers.wanted.append([1.0] * len(part))
            answers.found.append(part.float().tolist())
        return
    if task == "regress":
        answers.wanted += [[losses.value_of(example)] for example in examples]
        answers.found += [[value] for value in output.outputs.float().reshape(-1).tolist()]
        return
    numbers = output.outputs.argmax(-1).tolist()
    wanted = losses.classes(examples)
    lengths = [len(example.tokens) for example in examples] if task == "tag" else [1] * len(examples)
    at = 0
    for length in lengths:
        pairs = zip(wanted[at : at + length], numbers[at : at + length], strict=True)
        counted = [(a, b) for a, b in pairs if a != losses.IGNORED]
        answers.wanted.append([a for a, _ in counted])
        answers.found.append([b for _, b in counted])
        at += length


def _span_f1(spec: JobSpec, answers: _Answers) -> float:
    labels = spec.labels or []
    named = [[[labels[int(n)] for n in row] for row in rows] for rows in (answers.wanted, answers.found)]
    return scores.span_f1(named[0], named[1], labels)


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The examples by length, a pass's worth at a time."""
    batch: list[Example] = []
    tokens = 0
    for example in sorted(examples, key=lambda example: len(example.tokens)):
        length = len(example.tokens) + len(example.target)
        if batch and tokens + length > STEP_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(example)
        tokens += length
    if batch:
        yield batch
