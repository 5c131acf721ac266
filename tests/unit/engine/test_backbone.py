"""Which backbones the engine takes: decided by the configuration, before a weight is read."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from deltas.backbones import families
from server.engine.backbone import SERVED, BackboneError, family, locate
from server.engine.gguf import READ

LISTED = re.escape(", ".join(SERVED))


def folder_of(architecture: str, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": architecture}))
    return str(folder)


def gguf_of(architecture: str, folder: Path) -> str:
    """The first bytes of such a file, which are all that is read."""
    path = folder / "some.gguf"
    key, value = b"general.architecture", architecture.encode()
    fields = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fields)
    return str(path)


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str, tmp_path: Path) -> None:
    assert family(locate(folder_of(name, tmp_path))) == name


def test_a_family_with_a_table_but_no_engine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.backbone.families", lambda: [*families(), "mamba"])
    with pytest.raises(BackboneError, match=f"'mamba', which the engine does not run yet; served: {LISTED}$"):
        family(locate(folder_of("mamba", tmp_path)))


def test_a_family_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BackboneError, match=f"'mamba', which has no table of sites; served: {LISTED}$"
    ) as caught:
        family(locate(folder_of("mamba", tmp_path)))
    assert (caught.value.code, caught.value.param) == ("invalid_backbone", "backbone")


@pytest.mark.parametrize("name", ["bert", "gemma3", "mamba"])
def test_a_gguf_is_refused_by_its_header(name: str, tmp_path: Path) -> None:
    """Also of families that are served from a folder: of theirs the conversion would lose what the file says."""
    with pytest.raises(
        BackboneError, match=f"{name!r}; of GGUF files are served: gpt2, llama, qwen2, qwen3;"
    ):
        family(locate(gguf_of(name, tmp_path)))


@pytest.mark.parametrize("name", READ)
def test_a_gguf_is_served(name: str, tmp_path: Path) -> None:
    assert family(locate(gguf_of(name, tmp_path))) == name


def test_every_served_family_has_a_table() -> None:
    assert set(SERVED) <= set(families())
    assert set(READ) <= set(SERVED)
