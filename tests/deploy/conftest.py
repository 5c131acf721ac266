"""What the deploy tests scrape, a real server under traffic, and the real Prometheus that scrapes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.command import serving
from tests.deploy.promserver import Prometheus, Target, running
from tests.deploy.traffic import Traffic
from tests.tiny import native_files, write_backbone

Native = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The /metrics of a server that was started by its command and is kept busy."""
    folder = tmp_path_factory.mktemp("scraped")
    backbone = write_backbone(folder / "tiny")
    flags = ["--backbone", str(backbone), "--dtype", "float32", "--threads", "1"]
    with serving(folder / "data", *flags) as server:
        traffic = Traffic(server, native_files(backbone, folder / "native"))
        traffic.start()
        try:
            yield Target(server.url.removeprefix("http://"), server.key)
        finally:
            traffic.stop()


@pytest.fixture(scope="session")
def prometheus(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A real Prometheus that scrapes the target every second."""
    with running(tmp_path_factory.mktemp("prometheus"), target) as server:
        yield server
