from __future__ import annotations

import asyncio
import hashlib
import hmac
import math

import pytest
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, ModelNotFound, NotFound
from server.store.connect import as_text
from server.store.idempotency import Claim, IdempotencyStore, StoredAnswer
from server.store.keys import Keys
from server.store.registry import Registry, RegistryCounts
from server.store.tenants import TenantStore
from server.types import ApiKey, Principal
from tests.unit.store.records import digest_of, fields

pytestmark = pytest.mark.anyio

SECRET = b"s" * 32


@pytest.fixture
def tenants(redis: Redis, keys: Keys) -> TenantStore:
    return TenantStore(redis, keys, SECRET)


async def test_create_get_patch_delete(tenants: TenantStore) -> None:
    made = await tenants.create("acme", {"deltas": 3, "weight": 1.5})
    assert made.limits == {"deltas": 3.0, "weight": 1.5}
    assert await tenants.get("acme") == made
    patched = await tenants.patch("acme", {"deltas": None, "jobs": 2, "none": None})
    assert patched.limits == {"weight": 1.5, "jobs": 2.0}
    assert await tenants.get("acme") == patched
    with pytest.raises(Conflict):
        await tenants.create("acme")
    assert await tenants.delete("acme") == []
    for call in (tenants.get("acme"), tenants.patch("acme", {}), tenants.delete("acme"),
                 tenants.create_key("acme"), tenants.list_keys("acme")):  # fmt: skip
        with pytest.raises(NotFound) as caught:
            await call
        assert "'acme'" in caught.value.message


@pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a/b", "a:b", "a" * 64, "a\n", "é", "\ud800"])
async def test_bad_names(tenants: TenantStore, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await tenants.create(name)
    assert caught.value.param == "name"
    for call in (tenants.get(name), tenants.delete(name), tenants.patch(name, {}), tenants.list_keys(name),
                 tenants.create_key(name), tenants.revoke_key(name, "key-0000000000000000")):  # fmt: skip
        with pytest.raises(NotFound):
            await call


@pytest.mark.parametrize(
    "limits", [{"deltas": -1}, {"deltas": math.nan}, {"deltas": math.inf}, {"Bad Name": 1}, {"": 1}]
)
async def test_bad_limits(tenants: TenantStore, limits: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await tenants.create("acme", limits)
    assert (caught.value.param or "").startswith("limits")
    with pytest.raises(InvalidRequest):
        await tenants.patch("default", dict(limits))


async def test_default_is_always_there(tenants: TenantStore) -> None:
    assert (await tenants.get("default")).name == "default"
    with pytest.raises(Conflict):
        await tenants.create("default")
    with pytest.raises(Conflict):
        await tenants.delete("default")
    key, text = await tenants.create_key("default")
    assert await tenants.find_key(text) == Principal(tenant="default", key_id=key.id)
    assert (await tenants.patch("default", {"weight": 2})).limits == {"weight": 2.0}


async def test_default_is_there_for_whoever_comes_first(redis: Redis, keys: Keys) -> None:
    for i, ask in enumerate(["get", "list", "keys", "key", "patch"]):
        tenants = TenantStore(redis, Keys(f"{keys.prefix}-{i}"), SECRET)
        if ask == "get":
            await tenants.get("default")
        elif ask == "list":
            assert [tenant.name for tenant in (await tenants.list()).items] == ["default"]
        elif ask == "keys":
            assert await tenants.list_keys("default") == []
        elif ask == "key":
            await tenants.create_key("default")
        else:
            await tenants.patch("default", {})


async def test_parallel_creates_have_one_winner(tenants: TenantStore) -> None:
    results = await asyncio.gather(*(tenants.create("acme") for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 19


async def test_parallel_patches_all_count(tenants: TenantStore) -> None:
    await tenants.create("acme")
    await asyncio.gather(*(tenants.patch("acme", {f"limit_{i}": i}) for i in range(20)))
    assert (await tenants.get("acme")).limits == {f"limit_{i}": float(i) for i in range(20)}


async def test_pages(tenants: TenantStore) -> None:
    await tenants.get("default")
    for name in ("c", "a", "b"):
        await tenants.create(name)
    page = await tenants.list(limit=2)
    assert ([tenant.name for tenant in page.items], page.has_more) == (["default", "c"], True)
    page = await tenants.list(after="c", limit=2)
    assert ([tenant.name for tenant in page.items], page.has_more) == (["a", "b"], False)
    for after in ("none", "", "\ud800"):
        with pytest.raises(InvalidRequest) as caught:
            await tenants.list(after=after)
        assert caught.value.param == "after"
    with pytest.raises(InvalidRequest):
        await tenants.list(limit=0)


async def test_keys(tenants: TenantStore) -> None:
    await tenants.create("acme")
    made = [await tenants.create_key("acme") for _ in range(5)]
    for key, text in made:
        assert text.startswith("ds-")
        assert len(text) >= 40
        assert type(key) is ApiKey
        assert key.hint == text[-4:]
        assert await tenants.find_key(text) == Principal(tenant="acme", admin=False, key_id=key.id)
    assert await tenants.list_keys("acme") == [key for key, _ in made]
    await tenants.revoke_key("acme", made[0][0].id)
    assert await tenants.find_key(made[0][1]) is None
    assert await tenants.list_keys("acme") == [key for key, _ in made[1:]]
    for key_id in (made[0][0].id, "none", "", "\ud800"):
        with pytest.raises(NotFound):
            await tenants.revoke_key("acme", key_id)


async def test_a_key_is_revoked_by_its_tenants_name_only(tenants: TenantStore) -> None:
    await tenants.create("a")
    await tenants.create("b")
    key, text = await tenants.create_key("a")
    with pytest.raises(NotFound):
        await tenants.revoke_key("b", key.id)
    assert await tenants.find_key(text) is not None
    assert await tenants.list_keys("b") == []


async def test_what_opens_nothing(tenants: TenantStore, redis: Redis, keys: Keys) -> None:
    key, text = await tenants.create_key("default")
    hashed = hmac.new(SECRET, text.encode(), hashlib.sha256).hexdigest()
    for wrong in ("", "ds-", text[:-1], text + "x", text.upper(), f" {text}", hashed, f"ds-{hashed}", key.id,
                  "ds-" + "x" * 10_000, "ds-\ud800", "ds-é"):  # fmt: skip
        assert await tenants.find_key(wrong) is None
    assert await TenantStore(redis, keys, b"another secret").find_key(text) is None


async def test_only_the_hmac_is_stored(tenants: TenantStore, redis: Redis, keys: Keys) -> None:
    _, text = await tenants.create_key("default")
    hashed = hmac.new(SECRET, text.encode(), hashlib.sha256).hexdigest()
    assert await redis.hexists(keys.api_keys, hashed)
    stored = ""
    async for name in redis.scan_iter(f"{keys.prefix}:*"):
        if await redis.type(name) == b"hash":
            stored += " ".join(as_text(v) for pair in (await redis.hgetall(name)).items() for v in pair)
        else:
            stored += " ".join(str(member) for member in await redis.zrange(name, 0, -1))
    assert hashed in stored
    assert text[3:] not in stored
    # Nor any part of it but the hint.
    assert not any(text[i : i + 8] in stored for i in range(3, len(text) - 8))


async def test_deleting_a_tenant_takes_all_it_has(tenants: TenantStore, redis: Redis, keys: Keys) -> None:
    registry = Registry(redis, keys)
    memory = IdempotencyStore(redis, keys)
    await tenants.create("a")
    await tenants.create("b")
    _, text = await tenants.create_key("a")
    _, kept = await tenants.create_key("b")
    for content in ("1", "2", "shared"):
        await registry.add("a", "s", fields(content), visibility="public")
    await registry.add("a", "t", fields("1"))
    await registry.add("b", "s", fields("shared"))
    await registry.quarantine(digest_of("1"), "why not")
    claim = await memory.begin("a", "POST /v1/deltas", "k", "h")
    assert isinstance(claim, Claim)
    await memory.finish(claim, StoredAnswer(status=201))
    await memory.begin("a", "POST /v1/deltas", "k2", "h")

    assert sorted(await tenants.delete("a")) == sorted([digest_of("1"), digest_of("2")])
    assert await tenants.find_key(text) is None
    assert await tenants.find_key(kept) is not None
    with pytest.raises(ModelNotFound):
        await registry.resolve("b", "a/s")
    assert await registry.counts() == RegistryCounts(names=1, versions=1, digests=1, quarantined=0)
    assert [key async for key in redis.scan_iter(f"{keys.prefix}:t:a:*")] == []
    # A new tenant of that name begins with nothing.
    await tenants.create("a")
    assert await tenants.list_keys("a") == []
    assert (await registry.list("a")).items == []
    assert isinstance(await memory.begin("a", "POST /v1/deltas", "k", "h"), Claim)


async def test_uploads_and_keys_against_the_tenants_end(
    tenants: TenantStore, redis: Redis, keys: Keys
) -> None:
    registry = Registry(redis, keys)
    for _ in range(10):
        await tenants.create("a")
        work = [registry.add("a", f"s{i}", fields(str(i))) for i in range(10)]
        made = [tenants.create_key("a") for _ in range(10)]
        await asyncio.gather(*work, tenants.delete("a"), *made, return_exceptions=True)
        assert await registry.counts() == RegistryCounts(names=0, versions=0, digests=0, quarantined=0)
        assert [key async for key in redis.scan_iter(f"{keys.prefix}:t:a:*")] == []
        assert await redis.hlen(keys.api_keys) == 0
