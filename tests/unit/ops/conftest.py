"""The kernels, and how many threads they may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deltas.ops import native


@pytest.fixture(scope="module")
def kernels() -> native.Kernels:
    found = native.load()
    if found is None:
        pytest.skip(f"no C kernels here: {native.why_unavailable()}")
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
