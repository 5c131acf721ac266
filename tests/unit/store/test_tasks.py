from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, NotFound
from server.store.keys import Keys
from server.store.tasks import TaskStore
from server.store.tenants import TenantStore
from server.types import DEFAULT_TENANT, Task

pytestmark = pytest.mark.anyio


@pytest.fixture
def tasks(redis: Redis, keys: Keys) -> TaskStore:
    return TaskStore(redis, keys)


@pytest.fixture
async def tenants(redis: Redis, keys: Keys) -> TenantStore:
    store = TenantStore(redis, keys, b"s" * 32)
    await store.create("acme")
    await store.create("north")
    return store


def task(name: str = "mood", **changes: object) -> Task:
    values: dict[str, object] = {
        "name": name,
        "kind": "classify",
        "model": "mood@live",
        "template": ["{a}", "{b}"],
        "labels": {"yes": ["y", "Y"]},
        "parameters": {"truncate_prompt_tokens": -1},
        "created_at": 1,
    }
    return Task(**(values | changes))  # type: ignore[arg-type]


async def test_create_get_delete(tasks: TaskStore, tenants: TenantStore) -> None:
    for one in (task(), task("chat", template=[{"role": "user", "content": "{a}"}], labels=["a"])):
        assert await tasks.create("acme", one) == (one, True)
        assert await tasks.get("acme", one.name) == one
    assert await tasks.create("acme", task(created_at=2)) == (task(), False)
    for other in (task(model="mood@2"), task(template=None), task(labels=["a"]), task(parameters={})):
        with pytest.raises(Conflict) as caught:
            await tasks.create("acme", other)
        assert caught.value.param == "name"
    assert await tasks.get("acme", "mood") == task()
    await tasks.delete("acme", "mood")
    with pytest.raises(NotFound):
        await tasks.get("acme", "mood")
    with pytest.raises(NotFound):
        await tasks.delete("acme", "mood")
    assert (await tasks.create("acme", task(model="mood@2")))[1]


async def test_tenants_do_not_see_each_other(tasks: TaskStore, tenants: TenantStore) -> None:
    await tasks.create("acme", task())
    await tasks.create(DEFAULT_TENANT, task(model="other"))
    for call in (tasks.get("north", "mood"), tasks.delete("north", "mood")):
        with pytest.raises(NotFound):
            await call
    assert (await tasks.list("north")).items == []
    assert (await tasks.get(DEFAULT_TENANT, "mood")).model == "other"
    with pytest.raises(NotFound):
        await tasks.create("nobody", task())


async def test_a_deleted_tenant_leaves_no_tasks(
    redis: Redis, keys: Keys, tasks: TaskStore, tenants: TenantStore
) -> None:
    await tasks.create("acme", task())
    await tenants.delete("acme")
    assert [key async for key in redis.scan_iter(f"{keys.prefix}:t:acme:*")] == []
    await tenants.create("acme")
    assert (await tasks.list("acme")).items == []


async def test_pages(tasks: TaskStore, tenants: TenantStore) -> None:
    names = ["c", "a", "b", "d"]
    for name in names:
        await tasks.create("acme", task(name))
    page = await tasks.list("acme", limit=3)
    assert ([item.name for item in page.items], page.has_more) == (["c", "a", "b"], True)
    page = await tasks.list("acme", after="b", limit=3)
    assert ([item.name for item in page.items], page.has_more) == (["d"], False)
    for after, limit in (("x", 3), ("a:b", 3), (None, 0)):
        with pytest.raises(InvalidRequest):
            await tasks.list("acme", after=after, limit=limit)


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "-a", "a" * 129, "é"])
async def test_bad_names(tasks: TaskStore, tenants: TenantStore, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await tasks.create("acme", task(name))
    assert (caught.value.param, "a task's name" in caught.value.message) == ("name", True)
    for call in (tasks.get("acme", name), tasks.delete("acme", name)):
        with pytest.raises(NotFound):
            await call


async def test_of_many_at_once_one_makes_it(tasks: TaskStore, tenants: TenantStore) -> None:
    made = await asyncio.gather(*(tasks.create("acme", task(created_at=n)) for n in range(20)))
    assert sum(new for _, new in made) == 1
    assert len({kept.created_at for kept, _ in made}) == 1
