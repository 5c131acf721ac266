"""Opens the Redis that holds the registry, and says clearly why when it cannot."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from server.errors import Unavailable

OLDEST_MAJOR = 7
_MAX_CONNECTIONS = 64
_TIMEOUT_SECONDS = 10.0


class StoreError(OSError):
    """The registry cannot be used at start: unreachable, too old, or of the wrong kind."""


class StoreClient(Redis):
    """A Redis client whose outages are ``Unavailable`` (503), so that callers never meet redis-py's errors.

    Errors that only a mistake of ours can cause (a wrong script, a wrong type) stay what they are.
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command. Raises Unavailable when Redis cannot be reached or cannot write now."""
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError) as error:
            raise Unavailable("the registry cannot be reached now", code="registry_unavailable") from error


async def open_redis(url: str) -> StoreClient:
    """A connected client for ``redis://``, ``rediss://`` or ``unix://``; answers are bytes.

    Raises StoreError, with what to do about it, when the URL is wrong or the server cannot be used.
    """
    # Short pauses, three seconds in all: an embedded Valkey is back by then, and no request should hang for longer.
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=8)
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=_TIMEOUT_SECONDS,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=retry,
        )
    except ValueError as error:
        raise StoreError(f"{without_password(url)} is not a Redis URL: {error}") from error
    client = cast(StoreClient, StoreClient.from_pool(pool))
    try:
        await check_version(client)
    except BaseException as error:
        await client.aclose()
        if isinstance(error, Unavailable):
            raise StoreError(f"Redis at {without_password(url)}: {error.__cause__}") from error
        raise
    return client


async def check_version(redis: Redis) -> str:
    """The server's name and version, such as ``valkey 9.1.2``; StoreError unless it is Valkey or Redis 7+."""
    try:
        info = await redis.info("server")
    except RedisError as error:
        raise StoreError(f"Redis does not answer INFO: {error}") from error
    if "cluster" in (info.get("redis_mode"), info.get("server_mode")):
        raise StoreError("Redis runs in cluster mode, which is not supported: use a single primary")
    if "valkey_version" in info:
        return f"valkey {info['valkey_version']}"
    version = str(info.get("redis_version", ""))
    major = re.match(r"\d+", version)
    if major is None or int(major.group()) < OLDEST_MAJOR:
        raise StoreError(f"Redis {version or '(no version)'} is too old: {OLDEST_MAJOR}+ or Valkey is needed")
    return f"redis {version}"


def without_password(url: str) -> str:
    """The URL as it may be logged."""
    hidden = re.sub(r"^([a-z]+://)[^/]*@", r"\1***@", url)
    return re.sub(r"(?i)([?&]password=)[^&]*", r"\1***", hidden)


def load_script(redis: Redis, *names: str) -> AsyncScript:
    """The Lua script ``NAME.lua`` of this package; it survives a flush or a restart of Redis.

    Of several names, the last is the script and the ones before define what it uses.
    """
    folder = files("server.store")
    texts = [folder.joinpath(f"{name}.lua").read_text(encoding="utf-8") for name in names]
    return redis.register_script("\n".join(texts))


def as_text(value: bytes | str) -> str:
    """A reply as text, whether the client decodes replies or not."""
    return value.decode() if isinstance(value, bytes) else value
