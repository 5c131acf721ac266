"""Which prompt tokens a step computes. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from server.engine.sequence import Sequence as Row


def chunks(rows: Sequence[Row], budget: int, served: Callable[[str], float]) -> dict[int, int]:
    """How many tokens of each prefilling row to compute, by row id; together at most ``budget``.

    Half of the budget goes by fairness (tenant's counter; a tenant's rows by priority, then order of admission), which
    alone guarantees that every tenant gets on; the rest goes to the rows with the least left, so that a short prompt
    need not wait for a long one. A source that an encoder reads is not divided: one that is longer than the budget goes
    alone.
    """
    counts: dict[int, int] = {}
    turn: dict[str, int] = {}  # of tenants that were served alike
    for n, seq in enumerate(rows):
        turn.setdefault(seq.tenant, n)
    fair = sorted(rows, key=lambda seq: (served(seq.tenant), turn[seq.tenant], seq.priority))
    left = _share((seq for seq in fair if not seq.unread), (budget + 1) // 2, counts)
    left = _begin((seq for seq in fair if seq.unread), left + budget // 2, counts)
    short = sorted(
        (seq for seq in rows if not seq.unread or seq.id in counts), key=lambda seq: seq.uncomputed
    )
    _share(short, left, counts)
    return counts


def _begin(rows: Iterable[Row], budget: int, counts: dict[int, int]) -> int:
    """Lets rows begin in order, with their whole source and one token each, until one does not fit; returns what is left.

    The first begins in any case, and the first that does not fit ends it, so that none is passed over for ever.
    """
    began = False
    for seq in rows:
        if began and seq.unread + 1 > budget:
            break
        began = True
        counts[seq.id] = 1
        budget -= seq.unread + 1
    return budget


def _share(rows: Iterable[Row], budget: int, counts: dict[int, int]) -> int:
    """Hand ``budget`` tokens to rows in order, adding to ``counts``; returns what nobody needed."""
    for seq in rows:
        if budget <= 0:
            break
        given = counts.get(seq.id, 0)
        count = min(budget, seq.uncomputed - given)
        if count:
            counts[seq.id] = given + count
            budget -= count
    return budget
