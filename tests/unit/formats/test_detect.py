"""Which library made these files: decided by the files alone, or refused with what would be accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.sites import BackboneSpec


def upload(folder: Path, **texts: Any) -> DeltaFiles:
    """Files by name with ``__`` for the dot; objects are written as JSON."""
    paths = {}
    for name, content in texts.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        paths[path.name] = path
    return DeltaFiles(paths)


def refused(files: DeltaFiles, spec: BackboneSpec, kind: type[DeltaError]) -> DeltaError:
    with pytest.raises(kind) as caught:
        read(files, spec)
    assert caught.value.field
    return caught.value


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"README__md": "x"},
        {"adapter_model__safetensors": "x"},
        {"adapter_config__json": {}},
        {"adapter_config__json": {"config": {}}},
        {"model__safetensors": "x", "config__json": {"model_type": "llama"}},
    ],
)
def test_nothing_known_is_refused_with_the_expected_layouts(
    texts: dict[str, Any], tmp_path: Path, spec: BackboneSpec
) -> None:
    files = upload(tmp_path, **texts)
    error = refused(files, spec, InvalidDelta)
    for word in ("PEFT", "AdapterHub", "native", "adapter_model.safetensors", "delta.safetensors"):
        assert word in str(error)
    assert all(name in str(error) for name in files.names)


@pytest.mark.parametrize(
    "texts",
    [
        {"adapter_config__json": {"peft_type": "LORA"}, "delta__safetensors": "x"},
        {"adapter_config__json": {"peft_type": "LORA", "config": {}, "name": "x"}},
    ],
)
def test_several_deltas_at_once_are_refused(
    texts: dict[str, Any], tmp_path: Path, spec: BackboneSpec
) -> None:
    assert "several" in str(refused(upload(tmp_path, **texts), spec, InvalidDelta))


def test_opendelta_is_known_by_its_delta_type(tmp_path: Path, spec: BackboneSpec) -> None:
    files = upload(tmp_path, config__json={"delta_type": "strange"}, pytorch_model__bin="x")
    assert "OpenDelta's 'strange'" in str(refused(files, spec, UnsupportedDelta))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("head_config__json", UnsupportedDelta),
        ("model_head__safetensors", UnsupportedDelta),
        ("adapter_fusion_config__json", UnsupportedDelta),
        ("adapter_setup__json", UnsupportedDelta),
        ("adapter__safetensors", InvalidDelta),
        ("config__json", InvalidDelta),
        ("evil__py", InvalidDelta),
    ],
)
def test_files_that_would_be_ignored_are_refused(
    saved: Path, spec: BackboneSpec, name: str, kind: type[DeltaError]
) -> None:
    upload(saved, **{name: "{}"})
    files = DeltaFiles({path.name: path for path in saved.iterdir()})
    assert name.replace("__", ".") in str(refused(files, spec, kind))


def test_harmless_files_are_never_opened(saved: Path, spec: BackboneSpec) -> None:
    paths = {path.name: path for path in saved.iterdir()}
    gone = saved / "is-not-there"
    beside = {"README.md": gone, "training_args.bin": gone, "tokenizer.json": gone}
    assert read(DeltaFiles(paths | beside), spec).digest == read(DeltaFiles(paths), spec).digest


def test_a_missing_weights_file_is_named(saved: Path, spec: BackboneSpec) -> None:
    files = DeltaFiles({"adapter_config.json": saved / "adapter_config.json"})
    assert refused(files, spec, InvalidDelta).field == "adapter_model.safetensors"


def test_names_are_never_paths(saved: Path, spec: BackboneSpec) -> None:
    paths = {path.name: path for path in saved.iterdir()}
    for name in ("../../etc/passwd", "/etc/passwd", "sub/README.md", "a\ud800", "x" * 10_000):
        error = refused(DeltaFiles(paths | {name: saved / "is-not-there"}), spec, InvalidDelta)
        assert len(str(error)) < 600
        str(error).encode()
