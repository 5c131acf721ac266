"""What a job's outputs cost. Sums, so that a step of several micro-batches divides once, by its whole weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from server.tuning.forward import Generated, Output
from server.tuning.spec import Example, JobSpec

IGNORED = -100  # the label of a token that does not count


def weight(spec: JobSpec, examples: Sequence[Example], kind: str, before: int) -> float:
    """By what the examples' losses are divided: predicted tokens, rows, tagged tokens, or their classes' weights.

    ``kind`` is the backbone's; ``before`` is how many virtual tokens stand before a row, without which nothing predicts
    its first.
    """
    if spec.task == "generate":
        if kind == "encoder-decoder":
            return float(sum(len(example.target) for example in examples))
        ranges = (part for example in examples for part in example.learn)
        return float(sum(stop - max(start, 0 if before else 1) for start, stop in ranges))
    if spec.task == "regress":
        return float(len(examples))
    labels = [label for label in classes(examples) if label != IGNORED]
    if spec.class_weights is None:
        return float(len(labels))
    return sum(spec.class_weights[label] for label in labels)


def total(spec: JobSpec, examples: Sequence[Example], output: Output) -> Tensor:
    """The sum of the losses of one pass's rows, a float32 scalar."""
    if isinstance(output, Generated):
        return output.losses.sum()
    scores = output.outputs
    if spec.task == "regress":
        wanted = torch.tensor([float(value_of(example)) for example in examples], device=scores.device)
        return F.mse_loss(scores.squeeze(-1), wanted, reduction="sum")
    weights = None
    if spec.class_weights is not None:
        weights = torch.tensor(spec.class_weights, device=scores.device)
    return F.cross_entropy(
        scores,
        torch.tensor(classes(examples), device=scores.device),
        weight=weights,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=spec.label_smoothing,
    )


def value_of(example: Example) -> float:
    if not isinstance(example.label, int | float):
        raise TypeError("a row to regress has a number as its label")
    return float(example.label)


def classes(examples: Sequence[Example]) -> list[int]:
    """The classes of rows, or of all their tokens."""
    found: list[int] = []
    for example in examples:
        found += example.label if isinstance(example.label, list) else [int(value_of(example))]
    return found
