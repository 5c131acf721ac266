"""The native format: what is saved is what is loaded, byte for byte; damage and strangers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltas.delta import Component, Delta
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.formats.header import read_header
from deltas.formats.native import load, save
from deltas.sites import BackboneSpec


def example() -> Delta:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lora = {"layers.0.attn.q/A": draw(3, 32), "layers.0.attn.q/B": draw(40, 3).bfloat16()}
    bitfit = {"layers.1.mlp.gate/beta": draw(48), "norm/beta": draw(32).half()}
    return Delta(
        (Component("lora", {"scale": 0.5}, lora), Component("bitfit", {}, bitfit)),
        "peft",
        {"from": "elsewhere"},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "delta.safetensors"
    save(example(), path)
    return path


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, drop: str = "", **changes: Any) -> None:
    """Write the file again with other tensors or another manifest."""
    manifest = json.loads(read_header(path, "x").metadata["deltaserve"]) | changes
    manifest = {key: value for key, value in manifest.items() if key != drop}
    save_file(tensors or load_file(path), path, {"deltaserve": json.dumps(manifest)})


def refused(path: Path, spec: BackboneSpec, kind: type[DeltaError] = InvalidDelta) -> DeltaError:
    with pytest.raises(kind) as caught:
        read(DeltaFiles({"delta.safetensors": path}), spec)
    assert caught.value.field
    return caught.value


def test_round_trip(path: Path, spec: BackboneSpec, tmp_path: Path) -> None:
    before = example()
    for delta in (load(path), read(DeltaFiles({"delta.safetensors": path}), spec)):
        assert delta.digest == before.digest
        assert delta.manifest() == before.manifest()
        for (name, got), (wanted_name, wanted) in zip(
            delta.named_tensors(), before.named_tensors(), strict=True
        ):
            assert name == wanted_name
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)
    save(load(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_bytes_do_not_depend_on_memory_or_origin(path: Path, tmp_path: Path) -> None:
    before = example()
    shuffled = tuple(
        Component(
            part.method,
            part.config,
            {
                name: torch.stack([tensor, tensor], -1)[..., 0]  # neither contiguous nor alone
                for name, tensor in reversed(part.tensors.items())
            },
        )
        for part in before.components
    )
    save(Delta(shuffled), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    beta = torch.ones(32)
    delta = Delta((Component("bitfit", {}, {"norm/beta": beta, "layers.0.attn.norm/beta": beta}),))
    save(delta, tmp_path / "x")
    assert load(tmp_path / "x").digest == delta.digest


def test_every_damaged_byte_of_data_is_noticed(path: Path) -> None:
    good = path.read_bytes()
    for position in range(len(good) - 1, len(good) - 400, -37):
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises(InvalidDelta):
            load(path)
    for size in range(0, len(good), 211):
        path.write_bytes(good[:size])
        with pytest.raises(InvalidDelta):
            load(path)


def test_the_digest_may_be_missing_in_an_upload_but_not_wrong(path: Path, spec: BackboneSpec) -> None:
    rewrite(path, drop="digest")
    assert read(DeltaFiles({"delta.safetensors": path}), spec).digest == example().digest
    with pytest.raises(InvalidDelta, match="no digest"):
        load(path)
    rewrite(path, digest="0" * 64)
    assert refused(path, spec).field == "digest"
    rewrite(path, digest=None)
    assert read(DeltaFiles({"delta.safetensors": path}), spec).digest == example().digest


def test_an_upload_is_brought_into_canonical_form(path: Path, spec: BackboneSpec) -> None:
    config = {"scale": 2, "scales": {"layers.0.attn.q": 2}}
    rewrite(
        path,
        drop="digest",
        components=[{"method": "lora", "config": config}, {"method": "bitfit", "config": {}}],
    )
    delta = read(DeltaFiles({"delta.safetensors": path}), spec)
    assert delta.manifest().count('"config":{"scale":2.0}') == 1


LORA = {"method": "lora", "config": {"scale": 1.0}}
BITFIT: dict[str, Any] = {"method": "bitfit", "config": {}}


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"version": 2}, UnsupportedDelta, "version"),
        ({"version": None}, UnsupportedDelta, "version"),
        ({"more": 1}, InvalidDelta, "more"),
        ({"components": []}, InvalidDelta, "components"),
        ({"components": {}}, InvalidDelta, "components"),
        ({"components": [LORA] * 17}, InvalidDelta, "components"),
        ({"components": [LORA]}, InvalidDelta, "1/layers.1.mlp.gate/beta"),
        ({"components": [LORA, BITFIT, LORA]}, InvalidDelta, "components"),
        ({"components": [LORA, "bitfit"]}, InvalidDelta, "components"),
        ({"components": [LORA, BITFIT | {"x": 1}]}, InvalidDelta, "components"),
        ({"components": [LORA, {"method": 1, "config": {}}]}, InvalidDelta, "components"),
        ({"components": [LORA, {"method": "bitfit", "config": None}]}, InvalidDelta, "components"),
        ({"components": [LORA, {"method": "magic", "config": {}}]}, UnsupportedDelta, "method"),
        ({"components": [LORA, {"method": "bitfit", "config": {"x": 1}}]}, InvalidDelta, "x"),
        ({"components": [{"method": "lora", "config": {}}, BITFIT]}, InvalidDelta, "scale"),
        ({"components": [{"method": "lora", "config": {"scale": "1"}}, BITFIT]}, InvalidDelta, "scale"),
        ({"components": [{"method": "lora", "config": {"scale": 1, "x": 1}}, BITFIT]}, InvalidDelta, "x"),
        (
            {"components": [{"method": "lora", "config": {"scale": 1, "scales": {"norm": 2}}}, BITFIT]},
            InvalidDelta,
            "scales",
        ),
        ({"components": [BITFIT, LORA]}, InvalidDelta, "0/layers.0.attn.q/A"),
    ],
)
def test_manifests_that_are_refused(
    path: Path, spec: BackboneSpec, changes: dict[str, Any], kind: type[DeltaError], field: str
) -> None:
    rewrite(path, drop="digest", **changes)
    assert refused(path, spec, kind).field == field


def test_tensors_that_are_refused(path: Path, spec: BackboneSpec) -> None:
    good = load_file(path)
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "two indices": ({"00/norm/beta": torch.ones(32)}, "00/norm/beta"),
        "no index": ({"norm/beta": torch.ones(32)}, "norm/beta"),
        "no site": ({"1/layers.9.mlp.up/beta": torch.ones(48)}, "1/layers.9.mlp.up/beta"),
        "no parameter": ({"1/norm": torch.ones(32)}, "1/norm"),
        "another parameter": ({"1/norm/gamma": torch.ones(32)}, "1/norm/gamma"),
        "another kind": ({"1/embed/beta": torch.ones(32)}, "1/embed/beta"),
        "wrong size": ({"1/layers.0.mlp.up/beta": torch.ones(47)}, "1/layers.0.mlp.up/beta"),
        "half a pair": ({"0/layers.1.attn.q/A": torch.ones(1, 32)}, "layers.1.attn.q/B"),
        "nan": ({"1/layers.0.mlp.up/beta": torch.full((48,), torch.nan)}, "1/layers.0.mlp.up/beta"),
        "half a head": ({"0/head/A": torch.ones(1, 32)}, "head/B"),
    }
    for name, (extra, field) in cases.items():
        rewrite(path, good | extra, drop="digest")
        assert refused(path, spec).field == field, name


def test_a_file_without_a_manifest(path: Path, spec: BackboneSpec) -> None:
    for metadata in (None, {"format": "pt"}, {"deltaserve": "[]"}, {"deltaserve": '{"a": 1, "a": 2}'}):
        save_file(load_file(path), path, metadata)
        assert refused(path, spec).field == "deltaserve"
