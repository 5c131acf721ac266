"""The backbone's weights in shared memory: the same model for whoever maps them, one copy, and nobody can change it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deltas.groups import site_groups
from deltas.sites import SiteKind
from server.engine import backbone as backbones
from server.engine import shared
from server.engine.backbone import SERVED, Backbone
from server.engine.wire import python_path
from tests.encoders import write_encoder
from tests.seq2seq import write_bart, write_t5
from tests.tiny import write_backbone
from tests.unit.backbones import tiny

NAMES = sorted({*tiny.CONFIGS, *(name for name in SERVED if name not in map(tiny.family_of, tiny.CONFIGS))})
CPU = torch.device("cpu")
MEGABYTE = 1 << 20


@pytest.fixture
def memory() -> Iterator[int]:
    fd = shared.create()
    yield fd
    os.close(fd)


def folder_of(name: str, folder: Path) -> Path:
    if name in tiny.CONFIGS:
        return tiny.save(name, folder)
    if name in ("t5", "bart"):
        return (write_t5 if name == "t5" else write_bart)(folder)
    return write_encoder(folder, name)


def tensors(backbone: Backbone) -> dict[str, torch.Tensor]:
    model = backbone.model
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", NAMES)
def test_who_maps_the_weights_has_the_same_model(name: str, tmp_path: Path, memory: int) -> None:
    folder = folder_of(name, tmp_path / "backbone")
    plain = tensors(backbones.load("tiny", folder, CPU, torch.float32))
    engine = backbones.load("tiny", folder, CPU, torch.float32)
    size = shared.share(engine, memory)
    assert size >= sum(p.numel() * p.element_size() for p in engine.model.parameters())
    mapped = shared.load(memory)
    assert (mapped.spec, mapped.parameters) == (engine.spec, engine.parameters)
    assert (mapped.softcap, mapped.head_scale) == (engine.softcap, engine.head_scale)
    for found in (tensors(engine), tensors(mapped)):
        assert found.keys() == plain.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, plain[key]), key
            assert not tensor.requires_grad
    modules = dict(mapped.model.named_modules())
    for group in site_groups(mapped.spec):
        if group.kind is SiteKind.LINEAR:
            weights = [modules[site.path].weight for site in group.sites]
            for one, two in itertools.pairwise(weights):
                assert one.data_ptr() + one.numel() * one.element_size() == two.data_ptr()


def test_a_stray_write_changes_nobody_else(tmp_path: Path, memory: int) -> None:
    engine = backbones.load("tiny", write_backbone(tmp_path), CPU, torch.bfloat16)
    shared.share(engine, memory)
    one, two = shared.load(memory), shared.load(memory)
    before = {name: tensor.clone() for name, tensor in tensors(engine).items()}
    for tensor in tensors(one).values():
        tensor.detach().add_(1)
    for other in (engine, two):
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(other).items())


def test_a_restarted_engine_finds_its_weights_and_a_half_filled_file_is_empty(
    tmp_path: Path, memory: int
) -> None:
    folder = write_backbone(tmp_path / "a")
    os.ftruncate(memory, 10 * MEGABYTE)  # an engine that was killed while it filled the file
    assert shared.weight_bytes(memory) == 0
    with pytest.raises(shared.SharedWeightsError, match="no engine has put"):
        shared.load(memory)
    first = backbones.load("tiny", folder, CPU, torch.float32)
    assert shared.share(first, memory) == shared.weight_bytes(memory)
    changed = os.fstat(memory).st_mtime_ns
    second = backbones.load("tiny", folder, CPU, torch.float32)
    shared.share(second, memory)
    assert os.fstat(memory).st_mtime_ns == changed
    other = backbones.load("tiny", write_backbone(tmp_path / "b", seed=1), CPU, torch.float32)
    with pytest.raises(shared.SharedWeightsError, match="have changed while the server ran"):
        shared.share(other, memory)


SECOND = """
import sys
from server.engine import shared
backbone = shared.load(int(sys.argv[1]))
for parameter in backbone.model.parameters():
    assert bool(parameter.isfinite().all())
print(shared.private_bytes())
next(backbone.model.parameters()).detach().zero_()
print(shared.private_bytes())
"""


def test_a_second_process_adds_no_copy(tmp_path: Path, memory: int) -> None:
    engine = backbones.load("tiny", write_backbone(tmp_path, positions=64), CPU, torch.float32)
    shared.share(engine, memory)
    done = subprocess.run(
        [sys.executable, "-P", "-c", SECOND, str(memory)],
        pass_fds=[memory],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert before == 0
    assert after > 0  # the measure sees a copy where there is one
