"""Estimates grow with the work, and what was measured counts more than what is stated."""

from __future__ import annotations

import pytest

from server.tuning.estimate import seconds


def test_seconds() -> None:
    assert seconds(1024, 135_000_000, "cpu") == pytest.approx(3.7, abs=0.1)
    assert seconds(2048, 135_000_000, "cpu") == pytest.approx(2 * seconds(1024, 135_000_000, "cpu"))
    assert seconds(1024, 135_000_000, "cuda") < seconds(1024, 135_000_000, "cpu")
    assert seconds(1000, 135_000_000, "cpu", tokens_per_second=500) == 2
