from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, Unavailable
from server.store.idempotency import REMEMBER_SECONDS, Claim, IdempotencyStore, StoredAnswer
from server.store.keys import Keys

pytestmark = pytest.mark.anyio

ROUTE = "POST /v1/deltas"
ANSWER = StoredAnswer(status=201, headers={"x-request-id": "1"}, body=b'{"a": "\xff"}')


@pytest.fixture
def memory(redis: Redis, keys: Keys) -> IdempotencyStore:
    return IdempotencyStore(redis, keys)


async def begun(memory: IdempotencyStore, *args: str) -> Claim:
    claim = await memory.begin(*args)
    assert isinstance(claim, Claim)
    return claim


async def test_the_second_gets_the_answer_of_the_first(memory: IdempotencyStore) -> None:
    claim = await begun(memory, "a", ROUTE, "k", "h")
    assert await memory.finish(claim, ANSWER)
    assert await memory.begin("a", ROUTE, "k", "h") == ANSWER
    assert await memory.begin("a", ROUTE, "k", "h") == ANSWER


async def test_another_body_is_a_conflict(memory: IdempotencyStore) -> None:
    claim = await begun(memory, "a", ROUTE, "k", "h")
    for _ in range(2):  # while the first is at work, and after
        with pytest.raises(Conflict) as caught:
            await memory.begin("a", ROUTE, "k", "other")
        assert caught.value.headers() == {"x-should-retry": "false"}
        await memory.finish(claim, ANSWER)


async def test_a_key_means_something_for_its_tenant_and_route_only(memory: IdempotencyStore) -> None:
    await begun(memory, "a", ROUTE, "k", "h")
    await begun(memory, "b", ROUTE, "k", "h")
    await begun(memory, "a", "POST /v1/tasks", "k", "h")
    await begun(memory, "a", ROUTE, "k2", "h")
    await begun(memory, "a", ROUTE + "k", "2", "h")


async def test_while_the_first_is_at_work_the_second_is_told_to_come_back(memory: IdempotencyStore) -> None:
    results = await asyncio.gather(
        *(memory.begin("a", ROUTE, "k", "h") for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(result, Claim) for result in results) == 1
    waiting = [result for result in results if isinstance(result, Unavailable)]
    assert len(waiting) == 19
    assert waiting[0].headers()["retry-after"] == "1"


async def test_a_failed_request_can_be_sent_again(memory: IdempotencyStore) -> None:
    claim = await begun(memory, "a", ROUTE, "k", "h")
    assert await memory.forget(claim)
    second = await begun(memory, "a", ROUTE, "k", "other")
    # The first has nothing to say any more.
    assert not await memory.finish(claim, ANSWER)
    assert not await memory.forget(claim)
    assert await memory.finish(second, ANSWER)


async def test_everything_expires(memory: IdempotencyStore, redis: Redis, keys: Keys) -> None:
    claim = await begun(memory, "a", ROUTE, "k", "h")
    name = keys.idempotency("a", ROUTE, "k")
    assert 0 < await redis.ttl(name) <= 60
    await memory.finish(claim, ANSWER)
    assert REMEMBER_SECONDS - 60 < await redis.ttl(name) <= REMEMBER_SECONDS
    # As if the time had come: names of answers long gone do not pile up.
    await redis.delete(name)
    await redis.zadd(keys.idempotency_index("a"), {name: 1})
    await begun(memory, "a", ROUTE, "k2", "h")
    assert await redis.zrange(keys.idempotency_index("a"), 0, -1) == [
        keys.idempotency("a", ROUTE, "k2").encode()
    ]


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_bad_keys(memory: IdempotencyStore, key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await memory.begin("a", ROUTE, key, "h")
    assert caught.value.param == "Idempotency-Key"


@pytest.mark.parametrize("key", ["é☃", "a:b*?[", "\ud800", " ", "x" * 255])
async def test_strange_keys(memory: IdempotencyStore, key: str) -> None:
    await memory.finish(await begun(memory, "a", ROUTE, key, "h"), ANSWER)
    assert await memory.begin("a", ROUTE, key, "h") == ANSWER
