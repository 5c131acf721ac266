from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from server.errors import Unavailable
from server.store.connect import StoreError, check_version, open_redis, without_password

pytestmark = pytest.mark.anyio


async def test_the_embedded_valkey_is_good_enough(valkey_url: str) -> None:
    client = await open_redis(valkey_url)
    try:
        assert (await check_version(client)).startswith("valkey ")
    finally:
        await client.aclose()


@pytest.mark.parametrize("url", ["http://x", "localhost:6379", "", "redis://localhost:port"])
async def test_what_is_no_redis_url(url: str) -> None:
    with pytest.raises(StoreError, match="is not a Redis URL"):
        await open_redis(url)


async def test_nobody_listens(tmp_path: object) -> None:
    with pytest.raises(StoreError, match=r"none\.sock") as caught:
        await open_redis(f"unix://{tmp_path}/none.sock?password=geheim")
    assert "geheim" not in str(caught.value)


async def test_passwords_are_hidden() -> None:
    assert without_password("redis://user:geheim@host:1/0") == "redis://***@host:1/0"
    assert without_password("redis://host/0?password=geheim&db=1") == "redis://host/0?password=***&db=1"
    assert without_password("unix:///a@b/c.sock") == "unix:///a@b/c.sock"


async def answering(info: str, use: Callable[[str], Awaitable[None]]) -> None:
    """Serve the Redis protocol with this INFO, and +OK for anything else, while ``use`` runs."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while header := await reader.readline():
            words = []
            for _ in range(int(header[1:])):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            if words[0].upper() == b"INFO":
                body = info.encode()
                writer.write(b"$%d\r\n%s\r\n" % (len(body), body))
            elif words[0].upper() == b"HELLO":
                writer.write(b"%1\r\n$5\r\nproto\r\n:3\r\n")
            else:
                writer.write(b"+OK\r\n")
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        await use(f"redis://127.0.0.1:{port}")
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("redis_version:6.2.14\r\n", "Redis 6.2.14 is too old"),
        ("", r"Redis \(no version\) is too old"),
        ("redis_version:7.2.4\r\nredis_mode:cluster\r\n", "cluster mode"),
        ("redis_version:7.2.4\r\nvalkey_version:8.0.1\r\nserver_mode:cluster\r\n", "cluster mode"),
    ],
)
async def test_servers_that_will_not_do(info: str, message: str) -> None:
    async def use(url: str) -> None:
        with pytest.raises(StoreError, match=message):
            await open_redis(url)

    await answering(info, use)


@pytest.mark.parametrize("version", ["7.0.0", "8.4.1", "10.0"])
async def test_servers_that_will_do(version: str) -> None:
    async def use(url: str) -> None:
        client = await open_redis(url)
        assert await check_version(client) == f"redis {version}"
        await client.aclose()

    await answering(f"redis_version:{version}\r\nredis_mode:standalone\r\n", use)


async def test_mistakes_of_ours_are_not_outages(valkey_url: str) -> None:
    client = await open_redis(valkey_url)
    try:
        with pytest.raises(Exception, match="unknown command") as caught:
            await client.execute_command("NOSUCH")
        assert not isinstance(caught.value, Unavailable)
    finally:
        await client.aclose()
