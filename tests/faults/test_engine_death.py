"""The engine process is killed: streams end in an error and not in a hang, and everything comes back by itself."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import uvloop

from server.config import Settings
from server.engine.messages import Drop, Reply, Request
from server.engine.process import EngineConfig
from server.engine.wire import ParentSide, python_path
from tests.api.command import Server, eventually
from tests.faults.conftest import Native
from tests.faults.requests import BACKBONE, LONG, answer, body, metric, streaming, upload
from tests.tiny import KINDS

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("faults")]

SECONDS = 5.0  # for an error to reach its client


async def test_streams_end_and_deltas_return(server: Server, native_file: Native) -> None:
    with server.http() as http:
        names = [f"death-{kind}" for kind in KINDS]
        for seed, (name, kind) in enumerate(zip(names, KINDS, strict=True)):
            assert upload(http, name, native_file(kind, seed)).status_code == 201
        before = [answer(http, model) for model in (BACKBONE, *names)]
        engine, restarts = server.engine, 2
        async with streaming(server) as streams:
            running = await streams.start(
                *(body(model, LONG) for model in (*names, *names[:3], BACKBONE)), within=60
            )
            assert [stream.status for stream in running] == [200] * 8
            engine.kill()
            (late,) = await streams.start(body(names[0], LONG), within=SECONDS)
            await streams.ended(within=SECONDS)
            for stream in running:
                assert not stream.cut
                assert stream.done
                assert stream.finish_reason is None
                assert stream.error is not None
                assert stream.error["code"] == "engine_restarting"
            # one that came too late is refused, or it was taken in before the death was noticed
            assert late.status == 503
            assert late.error is not None
            assert late.error["code"] == "engine_restarting"
            assert "retry-after" in late.headers
        # the next one dies while it starts
        eventually(
            lambda: server.child("server.engine.process") not in (None, engine), within=30, what="another"
        )
        server.engine.kill()
        assert await asyncio.to_thread(http.get, "/health/live")
        unready = http.get("/health/ready")
        assert unready.status_code == 503
        assert "engine" in unready.json()["reason"]
        assert metric(server, "engine_up") == 0
        server.wait_ready()
        assert [answer(http, model) for model in (BACKBONE, *names)] == before
        assert metric(server, "engine_up") == 1
        assert server.log().count("engine died") >= restarts
        assert "Traceback" not in server.log()


async def test_uploads_while_the_engine_is_away(server: Server, native_file: Native) -> None:
    """An upload that cannot be tried on the engine is refused, to be sent again; nothing of it stays."""
    with server.http() as http:
        server.engine.kill()
        refused = eventually(
            lambda: (r := upload(http, "away", native_file("lora", 50))).status_code == 503 and r,
            within=SECONDS,
            what="503",
        )
        assert refused.json()["error"]["code"] == "engine_restarting"
        server.wait_ready()
        assert upload(http, "away", native_file("lora", 50)).status_code in (200, 201)
        assert answer(http, "away").digest == http.get("/v1/deltas/away").json()["digest"]


def test_a_write_to_a_dead_engine_is_its_end() -> None:
    """Whichever notices first, the reader or a writer: the reader is told that the engine is gone."""

    async def run() -> None:
        ours, theirs = socket.socketpair()
        side: ParentSide[Reply, Request] = ParentSide(*await asyncio.open_unix_connection(sock=ours), Reply)
        theirs.close()
        for _ in range(10):
            side.send(Drop("a"))
        assert await asyncio.wait_for(side.receive(), 5) is None
        await side.close()

    uvloop.run(run())
    asyncio.run(run())


def test_an_engine_whose_messages_nobody_reads_any_more_leaves(backbone: Path, tmp_path: Path) -> None:
    """Its parent died with some of them unread, which resets the connection: a quiet end all the same."""
    settings = Settings(backbone=str(backbone), data_dir=tmp_path)
    values = {name: getattr(settings, name, None) for name in EngineConfig.__struct_fields__}
    config = msgspec.json.encode(EngineConfig(**values | {"data_dir": str(tmp_path)})).decode()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = subprocess.Popen(
            [sys.executable, "-m", "server.engine.process", str(theirs.fileno()), config],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": python_path()},
            stderr=subprocess.PIPE,
        )
        assert select.select([ours], [], [], 60)[0]
    with engine:
        try:
            assert engine.wait(10) == 0
            assert engine.stderr is not None
            assert engine.stderr.read() == b""
        finally:
            engine.kill()
