"""The tuner's process through its client: weights mapped from an engine's, jobs that end, stop, go on, and die alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from deltas.backbones import describe
from deltas.formats import native
from deltas.tuned import tunable
from server.config import Settings
from server.engine import backbone as backbones
from server.engine import shared
from server.tuning.client import TunerClient
from server.tuning.messages import (
    Begun,
    Checkpointed,
    Failed,
    Finished,
    FromTuner,
    Stepped,
    Stopped,
    TunerDied,
)
from server.tuning.spec import Example, JobSpec, MethodSpec
from tests.tiny import llama_config, write_backbone

pytestmark = pytest.mark.anyio
SECONDS = 120


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The memory in which an engine has put a tiny backbone's weights."""
    folder = write_backbone(tmp_path_factory.mktemp("backbone"))
    fd = shared.create()
    shared.share(backbones.load("tiny", folder, torch.device("cpu"), torch.float32), fd)
    yield fd
    os.close(fd)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, tuning_threads=1, tuning_priority="normal")


@asynccontextmanager
async def opened(settings: Settings, weights: int) -> AsyncIterator[TunerClient]:
    client = TunerClient(settings, weights)
    try:
        yield client
    finally:
        await client.close()


def job(
    folder: Path, name: str, *, epochs: int = 2, learning_rate: float | None = None
) -> tuple[JobSpec, str]:
    place = folder / name
    place.mkdir()
    rows = [Example([5 + n, 6 + n, 7 + n, 0], learn=[(2, 4)]) for n in range(16)]
    (place / "train.msgpack").write_bytes(msgspec.msgpack.encode(rows))
    options = tunable("lora").options({"rank": 2}, describe(llama_config(), ""))
    spec = JobSpec(
        id=name,
        tenant="default",
        name=name,
        task="generate",
        methods=[MethodSpec(method="lora", options=options, targets=["layers.0.attn.q", "layers.1.attn.v"])],
        epochs=epochs,
        batch_size=4,
        learning_rate=learning_rate,
        checkpoint_every=2,
    )
    return spec, str(place)


async def until(client: TunerClient, *ends: type) -> list[FromTuner | TunerDied]:
    """What it says until, and with, the first message of one of these types."""
    found: list[FromTuner | TunerDied] = []
    async with asyncio.timeout(SECONDS):
        async for message in client.messages():
            found.append(message)
            if isinstance(message, ends):
                return found
    raise AssertionError("the messages ended")


async def test_a_job_runs_on_weights_that_are_not_copied(
    settings: Settings, weights: int, tmp_path: Path
) -> None:
    async with opened(settings, weights) as client:
        await client.start(*job(tmp_path, "one"))
        found = await until(client, Finished, Failed, TunerDied)
    begun, ended = found[0], found[-1]
    assert isinstance(begun, Begun)
    assert (begun.step, begun.steps, begun.private_bytes) == (0, 8, 0)
    assert begun.backbone_bytes == shared.weight_bytes(weights)
    assert begun.trainable > 0
    assert isinstance(ended, Finished)
    assert [message.step for message in found if isinstance(message, Stepped)] == list(range(1, 9))
    assert native.load(Path(ended.file)).methods == ["lora"]


async def test_a_stopped_job_goes_on_where_it_was_in_another_process(
    settings: Settings, weights: int, tmp_path: Path
) -> None:
    straight, again = job(tmp_path, "straight", epochs=4), job(tmp_path, "again", epochs=4)
    digests = []
    async with opened(settings, weights) as client:
        await client.start(*straight)
        ended = (await until(client, Finished, Failed, TunerDied))[-1]
        assert isinstance(ended, Finished)
        digests.append(native.load(Path(ended.file)).digest)
        await client.start(msgspec.structs.replace(again[0], id="straight"), again[1])
        await until(client, Stepped)
        await client.stop("straight", keep=True)
        kept = await until(client, Stopped)
        assert isinstance(kept[-2], Checkpointed)
    async with opened(settings, weights) as client:
        await client.start(msgspec.structs.replace(again[0], id="straight"), again[1])
        found = await until(client, Finished, Failed, TunerDied)
    begun, ended = found[0], found[-1]
    assert isinstance(begun, Begun)
    assert begun.step > 0
    assert isinstance(ended, Finished)
    digests.append(native.load(Path(ended.file)).digest)
    assert digests[0] == digests[1]


async def test_a_job_that_cannot_work_fails_alone(settings: Settings, weights: int, tmp_path: Path) -> None:
    async with opened(settings, weights) as client:
        good, bad = job(tmp_path, "good", epochs=6), job(tmp_path, "bad")
        await client.start(*good)
        await until(client, Stepped)
        await client.start(msgspec.structs.replace(bad[0], metric="beauty"), bad[1])
        failed = (await until(client, Failed, TunerDied))[-1]
        assert isinstance(failed, Failed)
        assert (failed.job, failed.param) == ("bad", "metric")
        ended = (await until(client, Finished, Failed, TunerDied))[-1]
        assert isinstance(ended, Finished)
        assert ended.job == "good"


async def test_the_death_of_the_process_is_told_and_the_next_start_makes_another(
    settings: Settings, weights: int, tmp_path: Path
) -> None:
    async with opened(settings, weights) as client:
        spec, folder = job(tmp_path, "long", epochs=200)
        await client.start(spec, folder)
        await until(client, Checkpointed)
        first = client.pid
        assert first is not None
        os.kill(first, 9)
        died = (await until(client, TunerDied))[-1]
        assert isinstance(died, TunerDied)
        assert died.jobs == ["long"]
        assert "killed" in died.reason
        assert client.pid is None
        await client.start(spec, folder)
        begun = next(m for m in await until(client, Begun, Failed) if isinstance(m, Begun))
        assert begun.step >= 2
        assert client.pid not in (None, first)


async def test_a_step_that_cannot_be_computed_ends_its_job_and_no_other(
    settings: Settings, weights: int, tmp_path: Path
) -> None:
    """A token that the backbone does not have: nothing checks encoded rows again."""
    async with opened(settings, weights) as client:
        good, bad = job(tmp_path, "good", epochs=8), job(tmp_path, "bad")
        rows = [Example([5, 6, 1_000_000], learn=[(2, 3)])] * 16
        (Path(bad[1]) / "train.msgpack").write_bytes(msgspec.msgpack.encode(rows))
        await client.start(*good)
        await client.start(*bad)
        failed = (await until(client, Failed, TunerDied))[-1]
        assert isinstance(failed, Failed)
        assert (failed.job, failed.code) == ("bad", "tuning_failed")
        ended = (await until(client, Finished, Failed, TunerDied))[-1]
        assert isinstance(ended, Finished)
        assert ended.job == "good"
