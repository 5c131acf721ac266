"""A tiny backbone with a long context, so that rows run for seconds, and a server over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.command import Server, serving
from tests.faults.requests import POSITIONS
from tests.tiny import native_files, write_backbone

Native = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone's folder; its public name is ``tiny``."""
    return write_backbone(tmp_path_factory.mktemp("backbones") / "tiny", positions=POSITIONS)


@pytest.fixture(scope="session")
def flags(backbone: Path) -> list[str]:
    """What every server here is started with. One thread: on a busy machine two would wait for each other."""
    return ["--backbone", str(backbone), "--dtype", "float32", "--threads", "1"]


@pytest.fixture(scope="session")
def native_file(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Makes a random delta of a kind and a seed in the native format, the same one each time."""
    return native_files(backbone, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def one_server(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("shared") / "data", *flags) as running:
        yield running


@pytest.fixture
def server(one_server: Server) -> Server:
    """A server that outlives its engine and its Valkey, and so is shared by the tests that kill those."""
    one_server.wait_ready()
    return one_server
