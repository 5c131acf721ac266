"""Fixtures of the api's tests."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.running import Running, running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for a module's tests."""
    with running(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Running:
    """The module's server, its engine as new."""
    shared.engine.reset()
    return shared


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    """A client with the admin key."""
    with server.client() as client:
        yield client
