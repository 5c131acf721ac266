"""A real server over a real socket, real Valkey and real files; only the engine is a stand-in."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from deltas.backbones import describe
from server import logging
from server.api.address import bind
from server.api.lifespan import Background, run_jobs, stats_handler
from server.api.serve import drain, http_server
from server.api.services import Backbone, Services
from server.config import Settings
from server.metrics import Metrics
from server.store.blobs import FileBlobs
from server.store.connect import open_redis
from server.store.deltas import DeltaStore
from server.store.files import FileStore
from server.store.idempotency import IdempotencyStore
from server.store.jobs import JobStore
from server.store.keys import Keys
from server.store.registry import Registry
from server.store.tasks import TaskStore
from server.store.tenants import TenantStore
from server.store.valkey import EmbeddedValkey
from server.tenants.auth import Authenticator
from server.tuning.jobs import worker_name
from server.tuning.tuner import OpenTuner
from tests.api.fakes import INFO, VOCAB, ByteTokenizer, FakeEngine
from tests.api.preparing import prepare

ADMIN = "admin-key-for-tests"
HIDDEN = 16
SPEC = describe(
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCAB,
    ),
    INFO.revision,
)


@dataclass
class Running:
    """A server in a thread of its own."""

    url: str
    port: int
    engine: FakeEngine
    services: Services
    loop: asyncio.AbstractEventLoop
    server: Any
    thread: threading.Thread

    def client(self, key: str | None = ADMIN, **arguments: Any) -> httpx.Client:
        """An HTTP client; without a key for None."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **arguments)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the server's loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def drain(self) -> None:
        """What SIGTERM starts."""
        self.call(lambda: self.loop.create_task(drain(self.services, self.server)))


@contextmanager
def running(folder: Path, open_tuner: OpenTuner | None = None, **settings: Any) -> Iterator[Running]:
    """A server on a free port; one that runs tuning jobs if there is a tuner."""
    logging.configure("error", io.StringIO())
    started: list[Running] = []
    failed: list[BaseException] = []
    ready = threading.Event()

    async def main(bound: socket.socket) -> None:
        config = Settings(data_dir=folder, admin_key=ADMIN, **settings)
        async with AsyncExitStack() as stack:
            valkey = EmbeddedValkey(folder / "valkey")
            redis = await open_redis(await valkey.start())
            stack.push_async_callback(valkey.stop)
            stack.push_async_callback(redis.aclose)
            keys = Keys()
            tenants = TenantStore(redis, keys, b"secret" * 8)
            deltas = DeltaStore(Registry(redis, keys), FileBlobs(folder / "blobs"))
            await deltas.start()
            files = FileStore(redis, keys, folder / "files")
            await files.start()
            engine = FakeEngine()
            services = Services(
                settings=config,
                deltas=deltas,
                tenants=tenants,
                tasks=TaskStore(redis, keys),
                files=files,
                jobs=JobStore(redis, keys),
                authenticator=Authenticator(tenants, ADMIN),
                idempotency=IdempotencyStore(redis, keys),
                engine=engine,
                metrics=Metrics(),
                worker=worker_name(folder / "jobs"),
                prepare=prepare,
                resident=Backbone(INFO, SPEC, ByteTokenizer()),
            )
            background = Background()
            stack.push_async_callback(background.stop)
            engine.on_stats = stats_handler(services, background)
            if open_tuner is not None:
                background.start(run_jobs(services, open_tuner))
            server = http_server(services)
            port = bound.getsockname()[1]
            started.append(
                Running(
                    f"http://127.0.0.1:{port}",
                    port,
                    engine,
                    services,
                    asyncio.get_running_loop(),
                    server,
                    threading.current_thread(),
                )
            )
            serving = asyncio.ensure_future(server.serve(sockets=[bound]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            ready.set()
            await serving

    def thread(bound: socket.socket) -> None:
        try:
            asyncio.run(main(bound))
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            ready.set()

    with ExitStack() as stack:
        bound = stack.enter_context(bind("127.0.0.1", 0))
        worker = threading.Thread(target=thread, args=(bound,))
        worker.start()
        try:
            assert ready.wait(60)
            assert not failed
            yield started[0]
        finally:
            if started:
                started[0].services.state.halt.set()
                started[0].server.should_exit = True
            worker.join(60)
    assert not failed


def lora_files(folder: Path, seed: int = 0, rank: int = 2) -> dict[str, Path]:
    """A small LoRA as PEFT saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{start}.lora_A.weight": torch.randn(rank, HIDDEN, generator=generator),
        f"{start}.lora_B.weight": torch.randn(HIDDEN, rank, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": rank,
                "lora_alpha": 4,
                "target_modules": ["q_proj"],
                "layers_to_transform": [0],
                "bias": "none",
            }
        )
    )
    return {path.name: path for path in folder.iterdir()}


def push(client: httpx.Client, files: dict[str, Path], **fields: str) -> httpx.Response:
    """Upload files."""
    parts = [("file", (name, path.read_bytes())) for name, path in files.items()]
    return client.post("/v1/deltas", data=fields, files=parts)
