"""What a run comes to: counts, rates and percentiles, of everything, by kind of model and by endpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from server.bench.ask import Outcome
from server.bench.drive import Run

PERCENTILES = (50, 95, 99)


def summary(run: Run) -> dict[str, Any]:
    """The run's part of the report, ready for JSON; times are in seconds.

    ``lost`` is what was started and never ended, or ended in no state: 0, unless the generator itself is broken.
    """
    states = Counter(outcome.state for outcome in run.outcomes)
    known = states["succeeded"] + states["failed"] + states["cancelled"]
    late = [outcome.late for outcome in run.outcomes if outcome.late is not None]
    return {
        "seconds": run.seconds,
        "interrupted": run.interrupted,
        "started": run.started,
        "succeeded": states["succeeded"],
        "failed": states["failed"],
        "cancelled": states["cancelled"],
        "lost": run.started - known,
        "sent_late": percentiles(late),
        "groups": groups(run.outcomes, run.seconds),
    }


def groups(outcomes: Sequence[Outcome], seconds: float) -> list[dict[str, Any]]:
    """One for everything, then one a kind, then one an endpoint, each in the order of their names."""
    found = [_group("all", "all", outcomes, seconds)]
    for kind in sorted({outcome.request.kind for outcome in outcomes}):
        found.append(_group("kind", kind, [o for o in outcomes if o.request.kind == kind], seconds))
    for endpoint in sorted({outcome.request.endpoint for outcome in outcomes}):
        of_it = [o for o in outcomes if o.request.endpoint == endpoint]
        found.append(_group("endpoint", endpoint, of_it, seconds))
    return found


def _group(by: str, name: str, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Tokens are counted as they arrived, whatever became of their request; rates are over the whole run."""
    states = Counter(outcome.state for outcome in outcomes)
    errors = Counter(outcome.code for outcome in outcomes if outcome.code is not None)
    output_tokens = sum(outcome.output_tokens for outcome in outcomes)
    return {
        "by": by,
        "name": name,
        "requests": len(outcomes),
        "succeeded": states["succeeded"],
        "failed": states["failed"],
        "cancelled": states["cancelled"],
        "errors": dict(sorted(errors.items())),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
        "output_tokens": output_tokens,
        "output_tokens_per_second": _rate(output_tokens, seconds),
        "requests_per_second": _rate(states["succeeded"], seconds),
        "time_to_first_token": percentiles(o.first for o in outcomes if o.first is not None),
        "inter_token_latency": percentiles(gap for outcome in outcomes for gap in outcome.gaps),
        "latency": percentiles(o.seconds for o in outcomes if o.state == "succeeded"),
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """p50, p95, p99 and the largest; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{percent}": quantile(ordered, percent / 100) for percent in PERCENTILES} | {"max": ordered[-1]}


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of an ordered, non-empty list lies, linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
