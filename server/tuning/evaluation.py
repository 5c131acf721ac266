"""A job's validation set through its delta as it would be stored: the loss and what its task is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from deltas.bank import PackedDelta
from server.tuning import losses, scores
from server.tuning.answers import greedy
from server.tuning.batches import batches
from server.tuning.forward import Generated, Output, Part, Passes
from server.tuning.spec import Example, JobSpec, Task


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
    """The metrics of ``examples``, by name: those of the job's task; ROUGE-L only if it is the job's own metric.

    The loss is without label smoothing, whose best is not zero and depends on how much there is.
    """
    spec = msgspec.structs.replace(spec, label_smoothing=0.0)
    total = weight = 0.0
    answers = _Answers()
    kind, before = passes.backbone.spec.kind, delta.prefix_length
    for chosen in batches(examples, lambda example: len(example.tokens) + len(example.target)):
        (output,) = passes([Part(spec.task, chosen, delta)])
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
            if spec.metric == "rouge_l":
                answered = greedy(passes, examples, delta, frozenset(spec.ends))
                values += (scores.rouge_l([a for a, _ in answered], [b for _, b in answered]),)
        case "classify":
            values = tuple(
                score(wanted, found) for score in (scores.accuracy, scores.macro_f1, scores.matthews)
            )
        case "regress":
            values = (scores.pearson(wanted, found), scores.spearman(wanted, found))
        case "tag":
            values = (scores.accuracy(wanted, found), scores.macro_f1(wanted, found), _span_f1(spec, answers))
    names = [
        name for name in scores.METRICS[spec.task] if name == spec.metric or name not in scores.ON_REQUEST
    ]
    return dict(zip(names, (loss, *values), strict=True))


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
