"""Who sent a request: from its ``Authorization`` header to a Principal."""

from __future__ import annotations

import hashlib
import hmac
import re

from server.errors import AuthenticationFailed
from server.store.tenants import TenantStore
from server.types import DEFAULT_TENANT, Principal

_BEARER = re.compile(r"bearer +([^\s]+)", re.IGNORECASE)


class Authenticator:
    """Knows the admin key and, through the store, every tenant's keys. Denies by default."""

    def __init__(self, tenants: TenantStore, admin_key: str) -> None:
        if not re.fullmatch(r"[!-~]+", admin_key):
            raise ValueError("the admin key must be ASCII without spaces, and not empty")
        self._tenants = tenants
        self._admin = _hash(admin_key)

    async def authenticate(self, authorization: str | None) -> Principal:
        """The sender of a request with this ``Authorization`` header (None: there was none).

        Raises AuthenticationFailed; the message does not tell an unknown key from a revoked one.
        """
        if authorization is None:
            raise AuthenticationFailed("no API key: send the header 'Authorization: Bearer KEY'")
        match = _BEARER.fullmatch(authorization.strip())
        if match is None:
            raise AuthenticationFailed("the Authorization header must read 'Bearer KEY'")
        key = match[1]
        # Hashes have one length, so the time tells nothing of the admin key's.
        if hmac.compare_digest(_hash(key), self._admin):
            return Principal(tenant=DEFAULT_TENANT, admin=True)
        principal = await self._tenants.find_key(key)
        if principal is None:
            raise AuthenticationFailed("the API key is not valid")
        return principal


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
