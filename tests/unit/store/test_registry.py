from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from redis.asyncio import Redis

from server.errors import InvalidRequest, ModelNotFound, NotFound
from server.store.connect import as_text
from server.store.keys import Keys
from server.store.registry import Registry, RegistryCounts
from server.store.tenants import TenantStore
from tests.unit.store.records import digest_of, fields

pytestmark = pytest.mark.anyio


@pytest.fixture
def registry(redis: Redis, keys: Keys) -> Registry:
    return Registry(redis, keys)


@pytest.fixture
async def tenants(redis: Redis, keys: Keys) -> TenantStore:
    """With the tenants ``a`` and ``b``."""
    store = TenantStore(redis, keys, b"secret")
    await store.create("a")
    await store.create("b")
    return store


async def test_first_version_is_live_and_reads_back_whole(registry: Registry) -> None:
    given = fields(
        "x", labels=["no", "yes"], task_kind="classify", rank=None, metadata={"by": "é☃"}, sites=[]
    )
    record, created = await registry.add("default", "s", given, promote=False)
    assert created
    assert (record.id, record.tenant, record.name, record.version) == ("s@1", "default", "s", 1)
    assert (record.status, record.visibility) == ("ready", "private")
    assert {name: getattr(record, name) for name in given.__struct_fields__} == {
        name: getattr(given, name) for name in given.__struct_fields__
    }
    for reference in ("s", "s@1", "s@live", "default/s", "default/s@1", "default/s@live"):
        assert await registry.resolve("default", reference) == record
    assert await registry.get("default", "s", 1) == record
    assert await registry.versions("default", "s") == [record]
    assert await registry.aliases("default", "s") == {"live": 1}


async def test_promote_decides_whether_live_moves(registry: Registry) -> None:
    await registry.add("default", "s", fields("1"))
    await registry.add("default", "s", fields("2"), promote=False)
    assert (await registry.resolve("default", "s")).version == 1
    await registry.add("default", "s", fields("3"), promote=True)
    assert (await registry.resolve("default", "s")).version == 3


async def test_same_content_is_the_same_version(registry: Registry) -> None:
    first, _ = await registry.add("default", "s", fields("1", metadata={"kept": "yes"}))
    await registry.add("default", "s", fields("2"))
    again, created = await registry.add("default", "s", fields("1"), promote=False)
    assert (again, created) == (first, False)
    assert (await registry.resolve("default", "s")).version == 2
    assert len(await registry.versions("default", "s")) == 2
    # Under another name, it is a version of its own.
    other, created = await registry.add("default", "t", fields("1"))
    assert (other.version, created) == (1, True)
    # Pushed again with `promote`, it is live again. A visibility given then counts; without one it stays.
    again, created = await registry.add("default", "s", fields("1"), promote=True, visibility="public")
    assert (again.version, again.visibility, created) == (1, "public", False)
    assert (await registry.resolve("default", "s")).version == 1
    assert (await registry.add("default", "s", fields("1")))[0].visibility == "public"
    assert (await registry.add("default", "s", fields("1"), visibility="private"))[0].visibility == "private"


async def test_fifty_parallel_adds_give_versions_one_to_fifty(registry: Registry) -> None:
    added = await asyncio.gather(*(registry.add("default", "s", fields(str(i))) for i in range(50)))
    assert sorted(record.version for record, _ in added) == list(range(1, 51))
    assert all(created for _, created in added)
    stored = {record.version: record.digest for record in await registry.versions("default", "s")}
    assert stored == {record.version: record.digest for record, _ in added}
    assert await registry.counts() == RegistryCounts(names=1, versions=50, digests=50, quarantined=0)


async def test_the_same_digest_added_in_parallel_is_one_version(registry: Registry) -> None:
    added = await asyncio.gather(*(registry.add("default", "s", fields("x")) for _ in range(50)))
    assert Counter(created for _, created in added) == {True: 1, False: 49}
    assert {record.version for record, _ in added} == {1}
    assert await registry.counts() == RegistryCounts(names=1, versions=1, digests=1, quarantined=0)


async def test_versions_are_in_order_beyond_nine(registry: Registry) -> None:
    for i in range(12):
        await registry.add("default", "s", fields(str(i)))
    assert [record.version for record in await registry.versions("default", "s")] == list(range(1, 13))


async def test_aliases_move(registry: Registry) -> None:
    for i in range(3):
        await registry.add("default", "s", fields(str(i)))
    await registry.set_alias("default", "s", "stable.v1_x-y", 1)
    await registry.set_alias("default", "s", "live", 2)
    assert await registry.aliases("default", "s") == {"live": 2, "stable.v1_x-y": 1}
    assert (await registry.resolve("default", "s@stable.v1_x-y")).version == 1
    assert (await registry.resolve("default", "s")).version == 2
    await registry.set_alias("default", "s", "stable.v1_x-y", 3)
    assert (await registry.resolve("default", "s@stable.v1_x-y")).version == 3
    assert await registry.aliases_of("default", ["s", "none"]) == {
        "s": {"live": 2, "stable.v1_x-y": 3},
        "none": {},
    }


async def test_what_does_not_exist_is_model_not_found(registry: Registry) -> None:
    await registry.add("default", "s", fields("x"))
    for reference in (
        "none", "s@2", "s@0", "s@01", "s@none", "s@", "@1", "", "/s", "other/s", "default/none", "S",
        "s@LIVE", "s@1@1", "default/default/s", "s\n", "a" * 300, "s@" + "9" * 30, "\ud800", "*", "s@1 ",
    ):  # fmt: skip
        with pytest.raises(ModelNotFound) as caught:
            await registry.resolve("default", reference)
        assert caught.value.param == "model"
        assert len(caught.value.message) < 260
        caught.value.message.encode()
    for name in ("none", "", "a:b", "\ud800", "s@1"):
        with pytest.raises(ModelNotFound):
            await registry.get("default", name, 1)
        with pytest.raises(ModelNotFound):
            await registry.versions("default", name)
        with pytest.raises(ModelNotFound):
            await registry.aliases("default", name)
        with pytest.raises(ModelNotFound):
            await registry.set_alias("default", name, "live", 1)
        with pytest.raises(ModelNotFound):
            await registry.delete("default", name)
    for version in (0, -1, 2, 10**30):
        with pytest.raises(ModelNotFound):
            await registry.get("default", "s", version)
        with pytest.raises(ModelNotFound):
            await registry.set_alias("default", "s", "live", version)
        with pytest.raises(ModelNotFound):
            await registry.delete("default", "s", version)
    assert await registry.aliases("default", "s") == {"live": 1}


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a@1", "a b", "a:b", "é", "a" * 129, "a\n"])
async def test_bad_names_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await registry.add("default", name, fields("x"))
    assert caught.value.param == "name"


@pytest.mark.parametrize("alias", ["", "1", "3a", "Live", "a/b", "a@b", "a" * 65, "a\n"])
async def test_bad_aliases_are_refused(registry: Registry, alias: str) -> None:
    await registry.add("default", "s", fields("x"))
    with pytest.raises(InvalidRequest) as caught:
        await registry.set_alias("default", "s", alias, 1)
    assert caught.value.param == "alias"


async def test_another_tenants_private_delta_looks_like_none(
    registry: Registry, tenants: TenantStore
) -> None:
    await registry.add("a", "s", fields("x"))

    def said(error: ModelNotFound) -> tuple[object, ...]:
        return type(error), error.code, error.param, error.message.replace("none", "s")

    with pytest.raises(ModelNotFound) as private:
        await registry.resolve("b", "a/s")
    with pytest.raises(ModelNotFound) as missing:
        await registry.resolve("b", "a/none")
    assert said(private.value) == said(missing.value)
    with pytest.raises(ModelNotFound):
        await registry.resolve("b", "s")
    with pytest.raises(ModelNotFound):
        await registry.resolve("default", "a/s@1")
    assert (await registry.resolve("a", "a/s")).tenant == "a"
    assert (await registry.list("b")).items == []


async def test_only_the_public_versions_are_seen_by_others(registry: Registry, tenants: TenantStore) -> None:
    await registry.add("a", "s", fields("1"), visibility="public")
    await registry.add("a", "s", fields("2"), visibility="private")
    assert (await registry.resolve("b", "a/s@1")).digest == digest_of("1")
    for reference in ("a/s", "a/s@live", "a/s@2"):  # `live` is the private one
        with pytest.raises(ModelNotFound):
            await registry.resolve("b", reference)
    await registry.set_alias("a", "s", "live", 1)
    assert (await registry.resolve("b", "a/s")).version == 1
    # Public is for reading: nobody else lists, moves or deletes it, or finds it without its owner's name.
    for call in (registry.versions("b", "s"), registry.delete("b", "s"), registry.resolve("b", "s")):
        with pytest.raises(ModelNotFound):
            await call


async def test_adding_for_a_tenant_that_is_gone_is_refused(registry: Registry, tenants: TenantStore) -> None:
    await tenants.delete("a")
    with pytest.raises(NotFound) as caught:
        await registry.add("a", "s", fields("x"))
    assert caught.value.param == "tenant"
    assert await registry.counts() == RegistryCounts(names=0, versions=0, digests=0, quarantined=0)


async def test_deleting_a_version(registry: Registry) -> None:
    for i in range(1, 5):
        await registry.add("default", "s", fields(str(i)))
    await registry.set_alias("default", "s", "old", 1)
    await registry.set_alias("default", "s", "new", 4)
    assert await registry.delete("default", "s", 4) == [digest_of("4")]
    # Its aliases went with it; `live` went to the newest that is left.
    assert await registry.aliases("default", "s") == {"live": 3, "old": 1}
    assert await registry.delete("default", "s", 2) == [digest_of("2")]
    assert await registry.aliases("default", "s") == {"live": 3, "old": 1}
    with pytest.raises(ModelNotFound):
        await registry.resolve("default", "s@4")
    # A number is not given out twice, and a deleted content is a new version.
    record, created = await registry.add("default", "s", fields("4"))
    assert (record.version, created) == (5, True)
    assert await registry.counts() == RegistryCounts(names=1, versions=3, digests=3, quarantined=0)


async def test_with_its_last_version_the_name_goes(registry: Registry, redis: Redis, keys: Keys) -> None:
    await registry.add("default", "s", fields("1"), visibility="public")
    await registry.add("default", "s", fields("2"))
    await registry.delete("default", "s", 2)
    assert await registry.delete("default", "s", 1) == [digest_of("1")]
    with pytest.raises(ModelNotFound):
        await registry.resolve("default", "s")
    assert (await registry.list("default")).items == []
    assert await registry.counts() == RegistryCounts(names=0, versions=0, digests=0, quarantined=0)
    # Only the counters are left.
    assert [key async for key in redis.scan_iter(f"{keys.prefix}:*")] == [keys.counts.encode()]
    assert (await registry.add("default", "s", fields("1")))[0].version == 1
    assert (await registry.resolve("default", "s")).visibility == "private"


async def test_deleting_a_name_gives_its_digests(registry: Registry) -> None:
    for i in range(1, 4):
        await registry.add("default", "s", fields(str(i)))
    assert sorted(await registry.delete("default", "s")) == sorted(digest_of(str(i)) for i in range(1, 4))
    with pytest.raises(ModelNotFound):
        await registry.delete("default", "s")


async def test_a_shared_digest_is_dropped_with_its_last_version(
    registry: Registry, tenants: TenantStore
) -> None:
    await registry.add("a", "s", fields("x"))
    await registry.add("a", "t", fields("x"))
    await registry.add("b", "s", fields("x"))
    assert await registry.delete("a", "s") == []
    assert await registry.delete("a", "t", 1) == []
    assert await registry.referenced(digest_of("x"))
    assert await registry.delete("b", "s") == [digest_of("x")]
    assert not await registry.referenced(digest_of("x"))


async def test_pages(registry: Registry) -> None:
    names = [f"n{i}" for i in (3, 1, 2, 5, 4)]
    for name in names:
        await registry.add("default", name, fields(name))
    await registry.add("default", "n1", fields("newer"))  # a new version does not move its name
    seen = []
    after = None
    for size in (2, 2, 1):
        page = await registry.list("default", after=after, limit=2)
        assert len(page.items) == size
        assert page.has_more == (size == 2)
        seen += [(record.name, record.version) for record in page.items]
        # By name or by id, as a client likes.
        after = page.items[-1].name if len(seen) == 2 else page.items[-1].id
    assert seen == [("n3", 1), ("n1", 2), ("n2", 1), ("n5", 1), ("n4", 1)]
    page = await registry.list("default", limit=5)
    assert (len(page.items), page.has_more) == (5, False)
    assert (await registry.list("default", after="n4")).items == []
    for after in ("gone", "", "a:b", "\ud800"):
        with pytest.raises(InvalidRequest) as caught:
            await registry.list("default", after=after)
        assert caught.value.param == "after"
    for limit in (0, -1, 1001):
        with pytest.raises(InvalidRequest) as caught:
            await registry.list("default", limit=limit)
        assert caught.value.param == "limit"


async def test_quarantine_reaches_every_version_of_the_digest(
    registry: Registry, tenants: TenantStore
) -> None:
    await registry.add("a", "s", fields("bad"))
    await registry.add("a", "s", fields("good"))
    await registry.add("b", "t", fields("bad"))
    assert await registry.quarantine(digest_of("bad"), "NaN in the logits")
    assert not await registry.quarantine(digest_of("bad"), "again")
    assert await registry.quarantine_reason(digest_of("bad")) == "NaN in the logits"
    assert await registry.quarantine_reason(digest_of("good")) is None
    marked = ("quarantined", "NaN in the logits")
    found = [(record.status, record.status_reason) for record in await registry.versions("a", "s")]
    assert found == [marked, ("ready", None)]
    again, created = await registry.add("b", "u", fields("bad"))
    assert created
    for record in (again, await registry.resolve("b", "t"), *(await registry.list("b")).items):
        assert (record.status, record.status_reason) == marked
    assert (await registry.counts()).quarantined == 1
    # It ends with the last version.
    await registry.delete("a", "s", 1)
    await registry.delete("b", "t")
    await registry.delete("b", "u")
    assert await registry.quarantine_reason(digest_of("bad")) is None
    assert not await registry.quarantine(digest_of("bad"), "nobody has it")
    assert (await registry.counts()).quarantined == 0


async def integrity(registry: Registry, redis: Redis, keys: Keys, tenants: list[str]) -> None:
    """Checks that everything stored agrees with everything else."""
    digests: Counter[str] = Counter()
    names = versions = 0
    for tenant in tenants:
        page = await registry.list(tenant, limit=1000)
        for live in page.items:
            names += 1
            records = await registry.versions(tenant, live.name)
            versions += len(records)
            digests.update(record.digest for record in records)
            numbers = {record.version for record in records}
            aliases = await registry.aliases(tenant, live.name)
            assert aliases["live"] == live.version
            assert set(aliases.values()) <= numbers
            raw = await redis.hgetall(keys.delta(tenant, live.name))
            texts = {as_text(field): value for field, value in raw.items()}
            index = {k[2:]: int(v) for k, v in texts.items() if k.startswith("d:")}
            assert index == {record.digest: record.version for record in records}
    stored = await redis.hgetall(keys.digests)
    assert {as_text(k): int(v) for k, v in stored.items()} == digests
    counts = await registry.counts()
    assert (counts.names, counts.versions) == (names, versions)


@pytest.mark.parametrize("seed", range(5))
async def test_races_keep_integrity(
    registry: Registry, tenants: TenantStore, redis: Redis, keys: Keys, seed: int
) -> None:
    """Adds, alias moves, deletes and quarantines of a few names and contents, many at once."""
    rng = random.Random(seed)
    dropped: list[str] = []

    async def act() -> None:
        tenant = rng.choice("ab")
        name = rng.choice("xy")
        version = rng.randint(1, 12)
        kind = rng.random()
        try:
            if kind < 0.45:
                await registry.add(tenant, name, fields(str(rng.randint(1, 12))), promote=rng.random() < 0.5)
            elif kind < 0.65:
                await registry.set_alias(tenant, name, rng.choice(["live", "blue", "green"]), version)
            elif kind < 0.9:
                dropped.extend(await registry.delete(tenant, name, version))
            elif kind < 0.93:
                dropped.extend(await registry.delete(tenant, name))
            else:
                await registry.quarantine(digest_of(str(rng.randint(1, 12))), "why not")
        except ModelNotFound:
            pass

    for _ in range(10):
        await asyncio.gather(*(act() for _ in range(40)))
        await integrity(registry, redis, keys, ["a", "b"])
    # Whoever empties the registry has been told of every digest that was ever in it.
    for tenant in "ab":
        for record in (await registry.list(tenant)).items:
            dropped.extend(await registry.delete(tenant, record.name))
    assert await registry.counts() == RegistryCounts(names=0, versions=0, digests=0, quarantined=0)


async def test_alias_move_against_delete_of_its_target(registry: Registry) -> None:
    for round_ in range(30):
        await registry.add("default", "s", fields(f"{round_} first"))
        target, _ = await registry.add("default", "s", fields(f"{round_} second"))
        results = await asyncio.gather(
            registry.set_alias("default", "s", "blue", target.version),
            registry.set_alias("default", "s", "live", target.version),
            registry.delete("default", "s", target.version),
            return_exceptions=True,
        )
        assert all(result is None or isinstance(result, (ModelNotFound, list)) for result in results)
        aliases = await registry.aliases("default", "s")
        assert "blue" not in aliases
        assert aliases == {"live": target.version - 1}
        assert (await registry.resolve("default", "s")).version == target.version - 1


async def test_scripts_survive_a_script_flush(registry: Registry, redis: Redis) -> None:
    await registry.add("default", "s", fields("1"))
    await redis.script_flush()
    assert (await registry.resolve("default", "s")).version == 1
    assert (await registry.add("default", "s", fields("2")))[0].version == 2
