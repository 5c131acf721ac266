"""The server itself is killed: what it acknowledged is there after the next start, and nothing is left running."""

from __future__ import annotations

import asyncio
import io
import itertools
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from deltas.formats import native
from tests.api.command import Server, eventually, serving
from tests.faults.conftest import Native
from tests.faults.requests import BACKBONE, LONG, Answer, answer, body, streaming, upload
from tests.tiny import KINDS

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("faults")]

WORKERS = 4
KILLS = 2
TOKENS = 6


@dataclass
class Book:
    """What clients know of their uploads. A delta's content follows from its number, two numbers to a content."""

    native_file: Native
    tried: dict[str, Path] = field(default_factory=dict)
    acknowledged: dict[str, str] = field(default_factory=dict)  # name -> digest
    answers: dict[str, Answer] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def next(self) -> tuple[str, Path]:
        """A new name and its file."""
        number = next(self.numbers)
        content = number // 2
        name = f"delta-{number}"
        self.tried[name] = self.native_file(KINDS[content % len(KINDS)], content)
        return name, self.tried[name]


async def upload_until_killed(server: Server, book: Book, rng: random.Random) -> None:
    """Several clients push one delta after another and try each, until the server dies under them."""
    enough = len(book.acknowledged) + rng.randrange(12)
    loop = asyncio.get_running_loop()
    killing = False

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal killing
        while True:
            if len(book.acknowledged) >= enough and not killing:
                killing = True
                loop.call_later(rng.uniform(0, 0.05), server.process.kill)
            name, file = book.next()
            try:
                parts = {"file": ("delta.safetensors", file.read_bytes())}
                pushed = await http.post("/v1/deltas", data={"name": name}, files=parts)
                assert pushed.status_code == 201, pushed.text
                book.acknowledged[name] = pushed.json()["digest"]
                answered = await http.post("/v1/completions", json=body(name, TOKENS))
                assert answered.status_code == 200, answered.text
            except httpx.TransportError:
                assert killing
                return
            (choice,) = answered.json()["choices"]
            digest = answered.headers["x-delta-digest"]
            book.answers[name] = Answer(digest, tuple(choice["token_ids"]), choice["text"])

    headers = {"authorization": f"Bearer {server.key}"}
    async with (
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as http,
        asyncio.timeout(60),
        asyncio.TaskGroup() as group,
    ):
        for _ in range(WORKERS):
            group.create_task(client(http))


def all_names(http: httpx.Client) -> list[str]:
    names: list[str] = []
    while True:
        page = http.get(
            "/v1/deltas", params={"limit": 7, "after": names[-1]} if names else {"limit": 7}
        ).json()
        names += [item["name"] for item in page["data"]]
        if not page["has_more"]:
            return names


def check(http: httpx.Client, book: Book, scratch: Path) -> None:
    """Every acknowledged delta is whole; of the others, each is whole or absent, and can be pushed again."""
    present = set(all_names(http))
    assert book.acknowledged.keys() <= present <= book.tried.keys()
    for name in sorted(present):
        digest = http.get(f"/v1/deltas/{name}").json()["digest"]
        assert digest == book.acknowledged.get(name, digest)
        content = http.get(f"/v1/deltas/{name}/versions/1/content").raise_for_status()
        with tarfile.open(fileobj=io.BytesIO(content.content)) as tar:
            tar.extractall(scratch, filter="data")
        assert native.load(scratch / native.WEIGHTS).digest == digest == native.load(book.tried[name]).digest
        assert (found := answer(http, name, TOKENS)) == book.answers.setdefault(name, found)
        assert found.digest == digest
    for name in book.tried.keys() - book.acknowledged.keys():
        pushed = upload(http, name, book.tried[name])
        assert pushed.status_code == (200 if name in present else 201), pushed.text
        book.acknowledged[name] = pushed.json()["digest"]
        book.answers[name] = answer(http, name, TOKENS)


async def test_acknowledged_uploads_survive(flags: list[str], native_file: Native, tmp_path: Path) -> None:
    book, rng = Book(native_file), random.Random(2)
    scratch = tmp_path / "scratch"
    for start in range(KILLS + 1):
        with serving(tmp_path / "data", *flags) as server:
            children = [server.engine, server.valkey]
            assert not [*(server.data / "blobs" / "tmp").iterdir()]
            assert not [*server.data.glob("uploads/*")]
            with server.http() as http:
                await asyncio.to_thread(check, http, book, scratch)
            if start < KILLS:
                async with streaming(server) as streams:
                    (running,) = await streams.start(body(BACKBONE, LONG))
                    await upload_until_killed(server, book, rng)
                    await streams.ended(within=5)
                    assert running.cut
                server.kill()
            else:
                assert server.terminate() == 0
            eventually(lambda: not any(c.alive for c in children), within=5, what="no orphans")  # noqa: B023
            assert "Traceback" not in server.log(), server.log()[-3000:]
    assert len(book.acknowledged) >= KILLS * WORKERS


def test_an_engine_that_still_loads_goes_too(flags: list[str], tmp_path: Path) -> None:
    with serving(tmp_path / "data", *flags, wait=False) as server:
        children = [server.engine, server.valkey]
        server.kill()
        eventually(lambda: not any(child.alive for child in children), within=5, what="no orphans")
