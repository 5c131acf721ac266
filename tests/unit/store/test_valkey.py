from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from server.errors import Unavailable
from server.store.connect import open_redis
from server.store.keys import Keys
from server.store.registry import Registry
from server.store.valkey import DataFolderInUseError, EmbeddedValkey, EmbeddedValkeyError
from server.store.valkey_child import find_binary
from server.store.valkey_config import configuration, socket_path
from tests.unit.store.records import fields

pytestmark = pytest.mark.anyio

# A server of another process: starts Valkey on argv[1], prints its id, and waits to be killed.
_OTHER_SERVER = """
import asyncio, sys, threading
from pathlib import Path
from server.store.valkey import EmbeddedValkey

async def main():
    valkey = EmbeddedValkey(Path(sys.argv[1]))
    await valkey.start()
    print(valkey.pid, flush=True)
    await asyncio.Event().wait()

if sys.argv[2] == "main":
    asyncio.run(main())
else:
    threading.Thread(target=asyncio.run, args=(main(),)).start()
"""


@pytest.fixture
async def own(valkey_folder: Path) -> AsyncIterator[EmbeddedValkey]:
    """A Valkey of the test's own, not started; stopped in the end."""
    server = EmbeddedValkey(valkey_folder)
    yield server
    await server.stop()


@contextlib.contextmanager
def ended(process: int) -> Iterator[None]:
    """Inside, the process is known to exist; on leaving, waits until it has ended, whoever's child it is."""
    watched = os.pidfd_open(process)
    try:
        yield
        assert select.select([watched], [], [], 20)[0], "the process lives on"
    finally:
        os.close(watched)


async def write(server: EmbeddedValkey, *keys: str) -> None:
    client = await open_redis(server.url)
    try:
        for key in keys:
            await client.set(key, key)
    finally:
        await client.aclose()


async def read(server: EmbeddedValkey, key: str) -> object:
    client = await open_redis(server.url)
    try:
        return await client.get(key)
    finally:
        await client.aclose()


async def test_starts_fast_stops_cleanly_and_keeps_everything(own: EmbeddedValkey) -> None:
    begin = time.monotonic()
    url = await own.start()
    assert time.monotonic() - begin < 1.0
    assert own.running
    assert await own.start() == url  # nothing happens
    await write(own, "a")
    process = own.pid
    assert process is not None
    with ended(process):
        await own.stop()
    assert await own.wait() == 0
    await own.stop()
    # Nothing of a running server is left, and it can be started again.
    assert not list(own.folder.glob("*.sock"))
    assert await own.start() == url
    assert await read(own, "a") == b"a"


async def test_configuration_holds_what_durability_needs(own: EmbeddedValkey) -> None:
    await own.start()
    client = await open_redis(own.url)
    try:
        for name, value in {
            "appendonly": "yes",
            "appendfsync": "always",
            "port": "0",
            "save": "",
            "maxmemory-policy": "noeviction",
            "unixsocketperm": "700",
        }.items():
            assert (await client.config_get(name))[name] == value
    finally:
        await client.aclose()
    assert own.folder.stat().st_mode & 0o777 == 0o700


async def test_acknowledged_writes_survive_kill_9(own: EmbeddedValkey) -> None:
    """Killed while it writes: every version whose add returned is there, and the store is in order."""
    await own.start()
    keys = Keys()
    acknowledged: list[tuple[int, str]] = []
    client = await open_redis(own.url)
    enough = asyncio.Event()

    async def add(worker: int) -> None:
        registry = Registry(client, keys)
        for i in range(10_000):
            try:
                record, _ = await registry.add("default", "s", fields(f"{worker} {i}"))
            except Unavailable:
                return
            acknowledged.append((record.version, record.digest))
            if len(acknowledged) >= 200:
                enough.set()

    workers = [asyncio.create_task(add(worker)) for worker in range(4)]
    await enough.wait()
    assert own.pid is not None
    os.kill(own.pid, signal.SIGKILL)
    assert await own.wait() == -signal.SIGKILL
    await asyncio.gather(*workers)
    await client.aclose()

    await own.start()
    client = await open_redis(own.url)
    try:
        registry = Registry(client, keys)
        stored = {(record.version, record.digest) for record in await registry.versions("default", "s")}
        assert stored >= set(acknowledged)
        # A write that was under way is there whole or not at all.
        counts = await registry.counts()
        assert counts.versions == counts.digests == len(stored)
        assert sorted(version for version, _ in stored) == list(range(1, len(stored) + 1))
    finally:
        await client.aclose()


async def test_supervise_brings_it_back_and_clients_go_on(own: EmbeddedValkey) -> None:
    url = await own.start()
    watching = asyncio.create_task(own.supervise())
    client = await open_redis(url)
    try:
        registry = Registry(client, Keys())
        for round_ in range(1, 4):
            await registry.add("default", "s", fields(str(round_)))
            process = own.pid
            assert process is not None
            os.kill(process, signal.SIGKILL)
            # Retried within the client until Valkey is back; its scripts are new to the restarted server.
            assert (await registry.resolve("default", "s")).version == round_
            assert own.pid != process
            assert own.url == url
    finally:
        await client.aclose()
    assert not watching.done()
    await own.stop()
    await watching


async def test_supervise_gives_up_when_it_cannot_come_back(own: EmbeddedValkey) -> None:
    await own.start()
    watching = asyncio.create_task(own.supervise())
    assert own.pid is not None
    (own.folder / "valkey.conf").unlink()
    (own.folder / "valkey.conf").mkdir()  # a configuration that cannot be written
    os.kill(own.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"valkey\.conf"):
        await watching


async def test_an_outage_is_unavailable(own: EmbeddedValkey) -> None:
    await own.start()
    client = await open_redis(own.url)
    try:
        await own.stop()
        with pytest.raises(Unavailable) as caught:
            await Registry(client, Keys()).resolve("default", "s")
        assert caught.value.status == 503
        assert caught.value.headers()["retry-after"]
    finally:
        await client.aclose()


async def test_two_servers_on_one_folder(own: EmbeddedValkey) -> None:
    await own.start()
    second = EmbeddedValkey(own.folder)
    with pytest.raises(DataFolderInUseError, match="another server is running on"):
        await second.start()
    await second.stop()
    # The first did not notice.
    await write(own, "a")
    assert await read(own, "a") == b"a"
    await own.stop()
    await second.start()
    try:
        assert await read(second, "a") == b"a"
    finally:
        await second.stop()


@pytest.mark.parametrize("thread", ["main", "other"])
async def test_no_orphan_is_left_when_the_server_is_killed(own: EmbeddedValkey, thread: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OTHER_SERVER, str(own.folder), thread], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        process = int(await asyncio.to_thread(other.stdout.readline))
        with pytest.raises(DataFolderInUseError):
            await own.start()
        with ended(process):
            other.kill()
    # The socket it left does not matter.
    await own.start()
    await write(own, "a")


async def test_it_outlives_the_thread_that_started_it(own: EmbeddedValkey) -> None:
    starter = threading.Thread(target=asyncio.run, args=(own.start(),))
    starter.start()
    starter.join()
    await write(own, "a")
    assert own.running


async def test_an_orphan_that_lives_on_is_ended_first(own: EmbeddedValkey) -> None:
    """As where no parent-death signal exists: a Valkey at work on the folder, and nobody who minds it."""
    await own.start()
    await write(own, "a")
    await own.stop()
    config = own.folder / "valkey.conf"
    config.write_bytes(configuration(own.folder, socket_path(own.folder)))
    held = os.open(own.folder / "valkey.lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    with subprocess.Popen([find_binary(), config], pass_fds=[held], stdout=subprocess.DEVNULL) as orphan:
        os.close(held)
        await own.start()
        assert orphan.wait(20) in (0, -signal.SIGTERM)
        assert await read(own, "a") == b"a"


async def test_stale_files_do_not_matter(own: EmbeddedValkey) -> None:
    own.folder.mkdir()
    for name in ("server.lock", "valkey.lock", "valkey.sock", "valkey.pid", "valkey.conf"):
        (own.folder / name).write_text("99999")
    await own.start()
    await write(own, "a")


@pytest.mark.parametrize("name", ['a "b" \\c', "new\nline", "über ☃", "$(x) #y 'z'", "b\udcff"])
async def test_strange_folder_names(tmp_path: Path, name: str) -> None:
    server = EmbeddedValkey(tmp_path / name)
    try:
        await server.start()
        await write(server, "a")
        assert (tmp_path / name / "appendonlydir").is_dir()
    finally:
        await server.stop()


async def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / ("x" * 90) / ("y" * 90))
    try:
        url = await server.start()
        socket = socket_path(server.folder)
        assert not socket.is_relative_to(tmp_path)
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        await write(server, "a")
        await server.stop()
        assert not socket.parent.exists()
        assert await server.start() == url
        assert await read(server, "a") == b"a"
    finally:
        await server.stop()


async def test_a_temporary_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 90) / ("y" * 90)
    socket = socket_path(folder)
    socket.parent.chmod(0o777)
    try:
        server = EmbeddedValkey(folder)
        with pytest.raises(OSError, match="is not a private folder"):
            await server.start()
        await server.stop()
    finally:
        socket.parent.rmdir()


async def test_damaged_data_is_a_clear_error_and_frees_the_folder(own: EmbeddedValkey) -> None:
    await own.start()
    await write(own, "a", "b")
    await own.stop()
    log = next((own.folder / "appendonlydir").glob("*.incr.aof"))
    whole = log.read_bytes()
    log.write_bytes(b"nonsense" + whole[8:])
    with pytest.raises(
        EmbeddedValkeyError, match=r"(?s)Valkey ended with code 1 at start:\n.*Bad file format"
    ):
        await own.start()
    assert not own.running
    # A last write that was cut off, though, was never acknowledged: the rest is used.
    log.write_bytes(whole[:-3])
    await own.start()
    assert await read(own, "a") == b"a"
    assert await read(own, "b") is None


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = EmbeddedValkey(tmp_path / "file" / "valkey")
    with pytest.raises(OSError, match="file"):
        await server.start()
    await server.stop()


async def test_one_that_hangs_is_killed(valkey_folder: Path) -> None:
    server = EmbeddedValkey(valkey_folder, stop_seconds=0.05)
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    with ended(server.pid):
        await server.stop()
    assert await server.wait() == -signal.SIGKILL


async def test_a_cancelled_start_leaves_nothing(own: EmbeddedValkey) -> None:
    for pause in (0.0, 0.001, 0.01, 0.03, 0.05):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await own.start()
        await own.stop()
        assert not own.running
    await own.start()
    await write(own, "a")
