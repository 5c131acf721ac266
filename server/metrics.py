"""The server's metrics, by the names CONTRACT.md fixes, in a registry of their own.

The api process owns them all; the engine's numbers arrive as :class:`server.types.EngineStats`. No histogram
bears a tenant or a delta label, so the number of series does not grow with either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from server.types import EngineStats, JobState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# Cumulative counts of the engine: the field of EngineStats, and what it feeds.
_CUMULATIVE = (
    "preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "loads_from_host",
    "loads_from_disk",
    "load_failures",
)


class Metrics:
    """All series, and one small method for each thing that happens."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time stamp beside each counter would double the series
        self.registry = CollectorRegistry()
        self._last = EngineStats()
        self._restarts = 0
        self._quarantined: set[str] = set()

        self._running = self._gauge("requests_running", "rows that the engine is computing")
        self._waiting = self._gauge("requests_waiting", "rows that wait for a place in the batch")
        self._kv = self._gauge("kv_cache_usage_ratio", "share of the key/value memory in use, 0 to 1")
        self._resident = self._gauge("deltas_resident", "deltas in a tier", "tier")
        self._delta_bytes = self._gauge("delta_bytes", "bytes of deltas in a tier", "tier")
        self._jobs = self._gauge("jobs", "tuning jobs in a state", "state")
        self._engine_up = self._gauge("engine_up", "1 while the engine is ready for rows")

        self._requests = self._counter("requests", "answered requests", "kind", "outcome")
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens of accepted requests", "tenant")
        self._generated = self._counter("generated_tokens", "tokens generated", "tenant")
        self._preemptions = self._counter("preemptions", "rows put back to waiting for lack of memory")
        self._cache_queries = self._counter("prefix_cache_queries", "prompt tokens of rows that began")
        self._cache_hits = self._counter("prefix_cache_hits", "of those, the ones not computed again")
        self._loads = self._counter("delta_loads", "deltas brought to the device", "from_tier")
        self._load_failures = self._counter("delta_load_failures", "deltas that could not be brought there")
        self._quarantines = self._counter("deltas_quarantined", "deltas taken out of service for bad numbers")
        self._tuning_steps = self._counter("tuning_steps", "optimizer steps of tuning jobs")
        self._tuning_tokens = self._counter("tuning_tokens", "tokens that tuning jobs trained on")
        self._rejections = self._counter("admission_rejections", "requests refused before work", "reason")

        self._ttft = self._histogram("time_to_first_token_seconds", "from request to first token", _LONG)
        self._itl = self._histogram("inter_token_latency_seconds", "between tokens of one row", _SHORT)
        self._request_seconds = self._histogram("request_seconds", "from request to end of answer", _LONG)
        self._queue = self._histogram("queue_seconds", "a row's wait for a place in the batch", _LONG)
        self._load_seconds = self._histogram("delta_load_seconds", "to bring a delta to the device", _SHORT)
        self._batch_rows = self._histogram("batch_rows", "rows in a step", _ROWS)
        self._batch_deltas = self._histogram("batch_deltas", "distinct deltas in a step", (0, *_ROWS))

        for tier in ("device", "host", "disk"):
            self._resident.labels(tier).set(0)
            self._delta_bytes.labels(tier).set(0)
        self.jobs(dict.fromkeys(get_args(JobState), 0))
        for tier in ("host", "disk"):
            self._loads.labels(tier)
        self._engine_up.set(0)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    # requests

    def request_done(self, kind: str, outcome: str, seconds: float | None = None) -> None:
        """A request was answered; ``seconds`` is given for those that the engine computed."""
        self._requests.labels(kind, outcome).inc()
        if seconds is not None:
            self._request_seconds.observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was refused before any work was done for it (the reason is an error code)."""
        self._rejections.labels(reason).inc()

    def prompt_accepted(self, tenant: str, tokens: int) -> None:
        """A prompt went to the engine."""
        self._prompt_tokens.labels(tenant).inc(tokens)

    def tokens_generated(self, tenant: str, tokens: int) -> None:
        """The engine gave a row tokens."""
        self._generated.labels(tenant).inc(tokens)

    def first_token(self, seconds: float) -> None:
        """A row's first token, ``seconds`` after its request came."""
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, tokens: int) -> None:
        """``tokens`` more tokens of a row, ``seconds`` after the ones before."""
        for _ in range(tokens):
            self._itl.observe(seconds / tokens)

    def forget_tenant(self, tenant: str) -> None:
        """Remove a deleted tenant's series."""
        for counter in (self._prompt_tokens, self._generated):
            counter.remove(tenant)

    # tuning

    def jobs(self, counts: Mapping[JobState, int]) -> None:
        """How many tuning jobs are in each state."""
        for state, count in counts.items():
            self._jobs.labels(state).set(count)

    def tuned(self, tokens: int) -> None:
        """A job took an optimizer step on so many tokens."""
        self._tuning_steps.inc()
        self._tuning_tokens.inc(tokens)

    # the engine

    def engine_up(self, up: bool) -> None:
        """Whether the engine takes rows."""
        self._engine_up.set(int(up))

    def stored(self, deltas: int, bytes_: int) -> None:
        """What the blob store holds: the ``disk`` tier."""
        self._resident.labels("disk").set(deltas)
        self._delta_bytes.labels("disk").set(bytes_)

    def quarantined(self, count: int = 1) -> None:
        """Deltas were taken out of service."""
        self._quarantines.inc(count)

    def apply_stats(self, stats: EngineStats, restarts: int = 0) -> dict[str, str]:
        """Take over a report of the engine; the digests quarantined since the last one are returned, with the reasons.

        The engine's counts are cumulative from its start. ``restarts`` tells a restarted engine, whose
        counts begin again at zero, from a late report; a count that fell tells it too.
        """
        self._running.set(stats.rows_running)
        self._waiting.set(stats.rows_waiting)
        self._kv.set(stats.kv_tokens_used / stats.kv_tokens_total if stats.kv_tokens_total else 0.0)
        self._resident.labels("device").set(stats.deltas_device)
        self._resident.labels("host").set(stats.deltas_host)
        self._delta_bytes.labels("device").set(stats.delta_bytes_device)
        self._delta_bytes.labels("host").set(stats.delta_bytes_host)

        fell = any(getattr(stats, name) < getattr(self._last, name) for name in (*_CUMULATIVE, "steps"))
        last = EngineStats() if fell or restarts != self._restarts else self._last
        self._preemptions.inc(stats.preemptions - last.preemptions)
        self._cache_queries.inc(stats.prefix_cache_queries - last.prefix_cache_queries)
        self._cache_hits.inc(stats.prefix_cache_hits - last.prefix_cache_hits)
        self._loads.labels("host").inc(stats.loads_from_host - last.loads_from_host)
        self._loads.labels("disk").inc(stats.loads_from_disk - last.loads_from_disk)
        self._load_failures.inc(stats.load_failures - last.load_failures)
        self._last, self._restarts = stats, restarts

        for seconds in stats.load_seconds:
            self._load_seconds.observe(seconds)
        for seconds in stats.queue_seconds:
            self._queue.observe(seconds)
        for rows in stats.batch_rows:
            self._batch_rows.observe(rows)
        for deltas in stats.batch_deltas:
            self._batch_deltas.observe(deltas)

        fresh = {d: reason for d, reason in stats.quarantined.items() if d not in self._quarantined}
        self._quarantined = set(stats.quarantined)  # one that was deleted may be quarantined anew
        self.quarantined(len(fresh))
        return fresh

    # series

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"deltaserve_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"deltaserve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"deltaserve_{name}", text, buckets=buckets, registry=self.registry)
