"""Percentiles, and what a run's outcomes come to."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.ask import Outcome, State
from server.bench.drive import Run
from server.bench.plan import Request
from server.bench.report import percentiles, quantile, summary


def outcome(state: State | None, kind: str = "lora", endpoint: str = "completions", **fields: Any) -> Outcome:
    request = Request(kind, endpoint, "m", "/", {}, True)
    return Outcome(request, **{"sent": 10.0, "ended": 12.0, "state": state, **fields})


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(sorted(values), share) == pytest.approx(float(numpy.quantile(values, share)))


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0, "max": 3.0}
    found = percentiles(float(value) for value in range(100, -1, -1))
    assert found == pytest.approx({"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0})


def test_tokens_that_come_together_share_the_gap() -> None:
    streamed = outcome("succeeded")
    for tokens, now in ((2, 10.5), (1, 10.7), (4, 11.5)):
        streamed.arrived(tokens, now)
    assert streamed.first == pytest.approx(0.5)
    assert streamed.gaps == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2])
    assert streamed.output_tokens == 7


def test_a_run_is_counted_by_kind_and_endpoint() -> None:
    outcomes = [
        outcome("succeeded", first=0.5, gaps=[0.1, 0.3], output_tokens=3, prompt_tokens=8, late=0.01),
        outcome("succeeded", "base", "chat", first=1.5, output_tokens=1, prompt_tokens=2, late=0.03),
        outcome("failed", "base", "chat", code="model_not_found", late=0.02),
        outcome("failed", code="row_failed", first=0.5, output_tokens=1, late=0.02),
        outcome("cancelled", first=2.5, output_tokens=1, late=0.02),
    ]
    found = summary(Run(started=5, outcomes=outcomes, seconds=2.0))
    assert (found["started"], found["succeeded"], found["failed"], found["cancelled"]) == (5, 2, 2, 1)
    assert found["lost"] == 0
    assert found["sent_late"] == pytest.approx({"p50": 0.02, "p95": 0.028, "p99": 0.0296, "max": 0.03})
    groups = {(group["by"], group["name"]): group for group in found["groups"]}
    assert list(groups) == [
        ("all", "all"),
        ("kind", "base"),
        ("kind", "lora"),
        ("endpoint", "chat"),
        ("endpoint", "completions"),
    ]
    whole = groups["all", "all"]
    assert whole["errors"] == {"model_not_found": 1, "row_failed": 1}
    assert (whole["prompt_tokens"], whole["output_tokens"], whole["output_tokens_per_second"]) == (10, 6, 3.0)
    assert whole["requests_per_second"] == 1.0
    assert whole["latency"]["p50"] == 2.0
    assert whole["inter_token_latency"]["p50"] == pytest.approx(0.2)
    lora = groups["kind", "lora"]
    assert (lora["requests"], lora["succeeded"], lora["failed"], lora["cancelled"]) == (3, 1, 1, 1)
    assert lora["time_to_first_token"]["p50"] == 0.5
    assert groups["endpoint", "chat"]["inter_token_latency"] is None


def test_what_never_ended_is_said_to_be_lost() -> None:
    assert summary(Run(started=3, outcomes=[outcome("succeeded"), outcome(None)]))["lost"] == 2


def test_nothing_at_all() -> None:
    found = summary(Run(interrupted=True))
    assert (found["started"], found["lost"], found["sent_late"]) == (0, 0, None)
    assert found["groups"][0]["output_tokens_per_second"] == 0
    assert len(found["groups"]) == 1
