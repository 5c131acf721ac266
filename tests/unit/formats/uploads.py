"""Valid uploads of every format, as bytes by file name: what tests damage, rename, pack and compare.

PEFT's are made by PEFT, AdapterHub's and OpenDelta's are the fixtures that those libraries made. Pickled files are given
as safetensors, since converting one takes a process and seconds; tests of that are elsewhere.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save
from transformers import AutoConfig

from deltas import formats
from deltas.backbones import describe
from deltas.delta import Delta
from deltas.formats import adapterhub, native, opendelta
from deltas.sites import BackboneSpec
from deltas.weights import FrozenTensors

FIXTURES = Path(__file__).parents[2] / "oracle" / "fixtures"
BACKBONES = FIXTURES / "backbones"
_TWINS = {
    adapterhub.PICKLED: adapterhub.WEIGHTS,
    adapterhub.PICKLED_HEAD: adapterhub.HEAD,
    "pytorch_model_adapter_fusion.bin": "model_adapter_fusion.safetensors",
    opendelta.PICKLED: opendelta.WEIGHTS,
    "adapter_model.bin": "adapter_model.safetensors",
}


@dataclass(frozen=True)
class Upload:
    """A delta's files for one of the tiny backbones."""

    name: str
    family: str
    files: Mapping[str, bytes]

    @property
    def tensor_files(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    @property
    def json_files(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".json"))

    def with_file(self, name: str, data: bytes) -> Upload:
        return replace(self, files={**self.files, name: data})

    def read(self, folder: Path) -> Delta:
        """What the reader makes of it. Writes the files into ``folder``, which it leaves as it was."""
        with TemporaryDirectory(dir=folder) as scratch:
            paths = {}
            for index, (name, data) in enumerate(self.files.items()):
                paths[name] = Path(scratch) / f"part-{index}"
                paths[name].write_bytes(data)
            return formats.read(formats.DeltaFiles(paths), spec_of(self.family), frozen_of(self.family))


@cache
def spec_of(family: str) -> BackboneSpec:
    return describe(AutoConfig.from_pretrained(BACKBONES / family), "test")


@cache
def frozen_of(family: str) -> FrozenTensors:
    return FrozenTensors(BACKBONES / family)


def in_folder(name: str, family: str, folder: Path, *, pickled: bool = False) -> Upload:
    """The files of a folder, those in folders within it by relative names; ``pickled`` ones as they are."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.parent.name.startswith("converted-"):  # of a test that runs beside
            relative = path.relative_to(folder).as_posix()
            parent, _, last = relative.rpartition("/")
            if last in _TWINS and not pickled:
                files[f"{parent}/{_TWINS[last]}".lstrip("/")] = unpickled(path.read_bytes())
            else:
                files[relative] = path.read_bytes()
    return Upload(name, family, files)


def unpickled(data: bytes) -> bytes:
    """The safetensors twin of a file that ``torch.save`` wrote."""
    tensors = torch.load(io.BytesIO(data), weights_only=True)
    return save({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()})


def peft_uploads(families: tuple[str, ...], *, one_of_each: bool = False) -> Iterator[Upload]:
    """PEFT's cases, or the first of each of its types."""
    from tests.oracle.peft_reference import FAMILIES, save_delta  # imports PEFT
    from tests.oracle.peft_table import CASES

    kinds: set[str] = set()
    for case in CASES:
        if one_of_each and case.kind in kinds:
            continue
        kinds.add(case.kind)
        for family in families:
            if family in case.families:
                with TemporaryDirectory() as folder:
                    save_delta(replace(case, pickled=False), FAMILIES[family], Path(folder))
                    made = in_folder(f"peft/{case.name}/{family}", family, Path(folder))
                yield replace(made, files={n: d for n, d in made.files.items() if n != "README.md"})


def fixture_uploads(table: str, families: tuple[str, ...], *, pickled: bool = False) -> Iterator[Upload]:
    """What another library made: a table's cases for these families."""
    for family in families:
        for folder in sorted((FIXTURES / table).joinpath(family).iterdir()):
            if folder.is_dir():
                name = f"{table.partition('_')[0]}/{folder.name}/{family}"
                yield in_folder(name, family, folder, pickled=pickled)


def native_twin(upload: Upload, folder: Path) -> Upload:
    """The same delta in the native format."""
    with TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / native.WEIGHTS
        native.save(upload.read(folder), path)
        return Upload(f"native/{upload.name}", upload.family, {native.WEIGHTS: path.read_bytes()})


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    """A safetensors file's header and its tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Mapping[str, object] | bytes, body: bytes) -> bytes:
    """A safetensors file of any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body
