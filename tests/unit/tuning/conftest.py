from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.store.keys import Keys
from tests.unit.tuning.bench import Bench


@pytest.fixture
async def bench(redis: Redis, keys: Keys, tmp_path: Path) -> AsyncIterator[Bench]:
    """A server's share in tuning, ended after the test."""
    made = Bench(redis, keys, tmp_path)
    await made.files.start()
    await made.deltas.start()
    yield made
    for service, tuner in [*made.running]:
        await made.kill(service, tuner)
