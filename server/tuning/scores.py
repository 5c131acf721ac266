"""What tasks are judged by: from what was wanted and what was found to one number. Plain Python.

Where a number has no meaning (nothing to compare, no variance) it is 0, as in scikit-learn. All take sequences of one
length, and raise ValueError for others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from server.engine.spans import Word, merged
from server.tuning.spec import Task

METRICS: Mapping[Task, tuple[str, ...]] = {
    "generate": ("loss", "perplexity", "token_accuracy", "exact_match", "rouge_l"),
    "classify": ("loss", "accuracy", "macro_f1", "matthews"),
    "regress": ("loss", "pearson", "spearman"),
    "tag": ("loss", "accuracy", "macro_f1", "span_f1"),
}
"""By task. Any may be a job's own metric, and an evaluation has all of them but the ``ON_REQUEST``."""
ON_REQUEST = frozenset(
    {"rouge_l"}
)  # needs answers, a pass for a token or two: measured where it is the job's metric
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

LARGEST_EXPONENT = 700.0  # beyond, a perplexity is no float


def accuracy(wanted: Sequence[Hashable], found: Sequence[Hashable]) -> float:
    """The share that is right."""
    return _mean([float(a == b) for a, b in zip(wanted, found, strict=True)])


exact_match = accuracy
"""The share of answers (texts, or tuples of tokens) that are what was wanted, all of it."""


def macro_f1(wanted: Sequence[Hashable], found: Sequence[Hashable]) -> float:
    """The mean of the classes' F1, over the classes that were wanted or found."""
    hits = Counter(a for a, b in zip(wanted, found, strict=True) if a == b)
    counts = Counter(wanted) + Counter(found)
    return _mean([2 * hits[label] / count for label, count in counts.items()])


def matthews(wanted: Sequence[Hashable], found: Sequence[Hashable]) -> float:
    """Matthews' correlation coefficient, of two classes or more: from -1 to 1."""
    hits = sum(a == b for a, b in zip(wanted, found, strict=True))
    rows, of_wanted, of_found = len(wanted), Counter(wanted), Counter(found)
    together = hits * rows - sum(count * of_found[label] for label, count in of_wanted.items())
    one = rows * rows - sum(count * count for count in of_wanted.values())
    other = rows * rows - sum(count * count for count in of_found.values())
    return together / math.sqrt(one * other) if one and other else 0.0


def pearson(wanted: Sequence[float], found: Sequence[float]) -> float:
    """Pearson's correlation coefficient: from -1 to 1."""
    a, b = _centred(wanted), _centred(found)
    both = math.fsum(x * y for x, y in zip(a, b, strict=True))
    scale = math.hypot(*a) * math.hypot(*b)
    return max(-1.0, min(1.0, both / scale)) if scale else 0.0


def spearman(wanted: Sequence[float], found: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing theirs."""
    return pearson(_ranks(wanted), _ranks(found))


def rouge_l(wanted: Sequence[Sequence[Hashable]], found: Sequence[Sequence[Hashable]]) -> float:
    """The mean over rows of ROUGE-L's F1 (Lin 2004): how much of both, in order, is the longest common subsequence. A row
    is a sequence of words, or of tokens."""
    return _mean([_rouge_l(a, b) for a, b in zip(wanted, found, strict=True)])


def perplexity(loss: float) -> float:
    """Of a mean loss a token, in nats. Finite for every finite loss."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def span_f1(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]], labels: Sequence[str]) -> float:
    """F1 over all rows' spans, which are right where begin, end and label are. A row has a label for each word; words make
    spans as they do when they are served (``server/engine/spans.py``)."""
    hits = total = 0
    for a, b in zip(wanted, found, strict=True):
        if len(a) != len(b):
            raise ValueError(f"a row has {len(a)} labels wanted and {len(b)} found")
        one, other = _spans(a, labels), _spans(b, labels)
        hits += len(one & other)
        total += len(one) + len(other)
    return 2 * hits / total if total else 0.0


def _spans(tags: Sequence[str], labels: Sequence[str]) -> set[tuple[int, int, str]]:
    words = (Word(at, at + 1, tag, 1.0) for at, tag in enumerate(tags))
    return {(s["start"], s["end"], s["label"]) for s in merged(words, labels, "." * len(tags))}


def _rouge_l(wanted: Sequence[Hashable], found: Sequence[Hashable]) -> float:
    total = len(wanted) + len(found)
    return 2 * _common(wanted, found) / total if total else 0.0


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence. A bit of an integer for each item of ``one`` (Hyyrö 2004): the row of
    the usual table advances by an addition."""
    where: dict[Hashable, int] = {}
    for at, item in enumerate(one):
        where[item] = where.get(item, 0) | 1 << at
    every = (1 << len(one)) - 1
    row = every
    for item in other:
        match = row & where.get(item, 0)
        row = (row + match | row - match) & every
    return len(one) - row.bit_count()


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    for at in range(len(order)):
        if at + 1 == len(order) or values[order[at + 1]] != values[order[at]]:
            for place in order[first : at + 1]:
                ranks[place] = (first + at) / 2
            first = at + 1
    return ranks


def _centred(values: Sequence[float]) -> list[float]:
    mean = _mean(values)
    return [value - mean for value in values]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
