"""A job's validation set through its delta as it would be stored: the loss and what its task is judged by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from deltas.bank import PackedDelta
from server.tuning import losses
from server.tuning.forward import Generated, Output, Part, Passes
from server.tuning.spec import Example, JobSpec, Task

STEP_TOKENS = 4096  # of a pass without gradients

METRICS: dict[Task, tuple[str, ...]] = {
    "generate": ("loss", "perplexity", "token_accuracy", "exact_match"),
    "classify": ("loss", "accuracy"),
    "regress": ("loss",),
    "tag": ("loss", "accuracy"),
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


@torch.no_grad()
def evaluate(
    passes: Passes, spec: JobSpec, examples: Sequence[Example], delta: PackedDelta
) -> dict[str, float]:
    """The metrics of ``examples``, by name: those of the job's task."""
    total = weight = 0.0
    right = counted = 0
    whole = 0  # rows of which every token is right
    kind, before = passes.backbone.spec.kind, delta.prefix_length
    for chosen in _batches(examples):
        (output,) = passes([Part(spec.task, chosen, delta, spec.label_smoothing)])
        total += float(losses.total(spec, chosen, output))
        weight += losses.weight(spec, chosen, kind, before)
        hits, of, rows = _hits(spec.task, chosen, output)
        right, counted, whole = right + hits, counted + of, whole + rows
    loss = total / weight
    found = {"loss": loss}
    match spec.task:
        case "generate":
            found |= {
                "perplexity": math.exp(min(loss, 700.0)),
                "token_accuracy": right / counted,
                "exact_match": whole / len(examples),
            }
        case "classify" | "tag":
            found["accuracy"] = right / counted
    return found


def _hits(task: Task, examples: Sequence[Example], output: Output) -> tuple[int, int, int]:
    """Right answers, of how many, and rows that are right as a whole."""
    if isinstance(output, Generated):
        rows = [bool(part.all()) for part in torch.split(output.right, output.counts)]
        return int(output.right.sum()), len(output.right), sum(rows)
    if task == "regress":
        return 0, 0, 0
    wanted = torch.tensor(losses.classes(examples))
    counts = wanted != losses.IGNORED
    hit = (output.outputs.argmax(-1).cpu() == wanted) & counts
    return int(hit.sum()), int(counts.sum()), 0


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
