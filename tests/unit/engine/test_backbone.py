"""Which backbones the engine takes: decided by the configuration, before a weight is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from deltas.backbones import families
from server.engine.backbone import SERVED, BackboneError, family, locate

BACKBONES = Path(__file__).parents[2] / "oracle" / "fixtures" / "backbones"


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    assert family(locate(str(BACKBONES / name))) == name


@pytest.mark.parametrize("name", ["bert", "roberta", "t5"])
def test_a_family_with_a_table_but_no_engine_is_refused(name: str) -> None:
    with pytest.raises(
        BackboneError, match=f"{name!r}, which the engine does not run yet; served: gpt2, llama$"
    ):
        family(locate(str(BACKBONES / name)))


def test_a_family_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(
        BackboneError, match=r"'mamba', which has no table of sites; served: gpt2, llama$"
    ) as caught:
        family(locate(str(tmp_path)))
    assert (caught.value.code, caught.value.param) == ("invalid_backbone", "backbone")


def test_a_gguf_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "encoder.gguf"
    key, value = b"general.architecture", b"bert"
    fields = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fields)
    with pytest.raises(BackboneError, match="'bert', which the engine does not run yet"):
        family(locate(str(path)))


def test_every_served_family_has_a_table() -> None:
    assert set(SERVED) <= set(families())
