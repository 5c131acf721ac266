"""Names, and the engine's cumulative counts across its restarts."""

from __future__ import annotations

import pytest

from server.metrics import Metrics
from server.types import EngineStats

GAUGES = {
    "requests_running",
    "requests_waiting",
    "kv_cache_usage_ratio",
    "deltas_resident",
    "delta_bytes",
    "engine_up",
    "jobs",
}
COUNTERS = {
    "requests",
    "prompt_tokens",
    "generated_tokens",
    "preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "delta_loads",
    "delta_load_failures",
    "deltas_quarantined",
    "admission_rejections",
    "tuning_steps",
    "tuning_tokens",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_seconds",
    "queue_seconds",
    "delta_load_seconds",
    "batch_rows",
    "batch_deltas",
}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"deltaserve_{name}", labels)


def test_names_are_the_contracts() -> None:
    found = {
        (metric.type, metric.name.removeprefix("deltaserve_")) for metric in Metrics().registry.collect()
    }
    expected = {("gauge", name) for name in GAUGES} | {("counter", name) for name in COUNTERS}
    assert found == expected | {("histogram", name) for name in HISTOGRAMS}
    for metric in Metrics().registry.collect():
        if metric.type == "histogram":
            assert all(set(sample.labels) <= {"le"} for sample in metric.samples)


def test_cumulative_counts() -> None:
    metrics = Metrics()
    first = EngineStats(steps=5, preemptions=2, loads_from_disk=3, loads_from_host=1, load_failures=1)
    metrics.apply_stats(first)
    metrics.apply_stats(first)
    assert value(metrics, "preemptions_total") == 2
    metrics.apply_stats(
        EngineStats(steps=9, preemptions=5, loads_from_disk=3, loads_from_host=4, load_failures=1)
    )
    assert value(metrics, "preemptions_total") == 5
    assert value(metrics, "delta_loads_total", from_tier="host") == 4
    assert value(metrics, "delta_loads_total", from_tier="disk") == 3
    assert value(metrics, "delta_load_failures_total") == 1


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_restarted_engine_counts_from_zero(restarts: int) -> None:
    metrics = Metrics()
    metrics.apply_stats(EngineStats(steps=9, preemptions=5))
    steps = 9 if restarts else 1  # the restart count tells it even where no count fell
    metrics.apply_stats(EngineStats(steps=steps, preemptions=5 if restarts else 1), restarts)
    assert value(metrics, "preemptions_total") == (10 if restarts else 6)


def test_gauges_and_samples() -> None:
    metrics = Metrics()
    fresh = metrics.apply_stats(
        EngineStats(
            rows_running=3,
            rows_waiting=2,
            kv_tokens_used=25,
            kv_tokens_total=100,
            deltas_device=4,
            delta_bytes_host=7,
            quarantined={"a": "why", "b": "why"},
            batch_rows=[3, 4],
            batch_deltas=[0, 2],
            queue_seconds=[0.1],
            load_seconds=[0.2, 0.3],
        )
    )
    assert fresh == {"a": "why", "b": "why"}
    assert metrics.apply_stats(EngineStats(quarantined={"a": "why", "b": "why", "c": "so"})) == {"c": "so"}
    assert value(metrics, "deltas_quarantined_total") == 3
    assert value(metrics, "batch_rows_count") == 2
    assert value(metrics, "batch_rows_sum") == 7
    assert value(metrics, "batch_deltas_bucket", le="0.0") == 1
    assert value(metrics, "delta_load_seconds_count") == 2
    assert value(metrics, "queue_seconds_count") == 1
    assert value(metrics, "requests_running") == 0
    metrics.apply_stats(EngineStats(rows_running=3, kv_tokens_used=25, kv_tokens_total=100, deltas_device=4))
    assert value(metrics, "requests_running") == 3
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    assert value(metrics, "deltas_resident", tier="device") == 4


def test_requests_and_tenants() -> None:
    metrics = Metrics()
    metrics.prompt_accepted("acme", 10)
    metrics.tokens_generated("acme", 3)
    metrics.first_token(0.5)
    metrics.next_tokens(0.4, 2)
    metrics.request_done("chat", "ok", 1.0)
    metrics.request_done("chat", "client_error")
    assert value(metrics, "prompt_tokens_total", tenant="acme") == 10
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.4)
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "request_seconds_count") == 1
    metrics.forget_tenant("acme")
    metrics.forget_tenant("nobody")
    assert "acme" not in metrics.render().decode()
    assert "_created" not in metrics.render().decode()
