from __future__ import annotations

import pytest
from redis.asyncio import Redis

from server.errors import AuthenticationFailed
from server.store.keys import Keys
from server.store.tenants import TenantStore
from server.tenants.auth import Authenticator
from server.types import Principal

pytestmark = pytest.mark.anyio

ADMIN = "ds-admin-geheim"


@pytest.fixture
def tenants(redis: Redis, keys: Keys) -> TenantStore:
    return TenantStore(redis, keys, b"s" * 32)


@pytest.fixture
def authenticator(tenants: TenantStore) -> Authenticator:
    return Authenticator(tenants, ADMIN)


async def test_the_admin_key_acts_for_default(authenticator: Authenticator) -> None:
    for header in (f"Bearer {ADMIN}", f"bearer {ADMIN}", f"  BEARER   {ADMIN} "):
        assert await authenticator.authenticate(header) == Principal(tenant="default", admin=True)


async def test_a_tenants_key_acts_for_its_tenant(authenticator: Authenticator, tenants: TenantStore) -> None:
    await tenants.create("acme")
    key, text = await tenants.create_key("acme")
    expected = Principal(tenant="acme", admin=False, key_id=key.id)
    assert await authenticator.authenticate(f"Bearer {text}") == expected
    await tenants.revoke_key("acme", key.id)
    with pytest.raises(AuthenticationFailed) as caught:
        await authenticator.authenticate(f"Bearer {text}")
    assert text not in caught.value.message
    _, text = await tenants.create_key("acme")
    await tenants.delete("acme")
    with pytest.raises(AuthenticationFailed):
        await authenticator.authenticate(f"Bearer {text}")


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", ADMIN, f"Basic {ADMIN}", f"Bearer{ADMIN}", f"Bearer {ADMIN} x",
        f"Bearer {ADMIN}x", f"Bearer {ADMIN[:-1]}", "Bearer é☃", "Bearer \ud800",
        f"Bearer {ADMIN},Bearer {ADMIN}", "Bearer ds-x",
        "Bearer " + "x" * 100_000, f"Bearer {ADMIN.upper()}", "Bearer \x00",
    ],
)  # fmt: skip
async def test_everything_else_is_denied(authenticator: Authenticator, header: str | None) -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        await authenticator.authenticate(header)
    assert caught.value.status == 401
    assert caught.value.headers() == {"www-authenticate": "Bearer"}
    assert ADMIN not in caught.value.message


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "é"])
async def test_an_admin_key_that_no_header_could_carry(tenants: TenantStore, key: str) -> None:
    with pytest.raises(ValueError, match="admin key"):
        Authenticator(tenants, key)
