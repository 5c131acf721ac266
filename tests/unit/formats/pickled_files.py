"""Makers of pickled files, honest and forged, and what becomes of them."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.formats.pickled import Limits, convert

NAME = "adapter_model.bin"
FEW = Limits(seconds=60, cpu_seconds=30, memory=256 << 20)


def converted(path: Path, limits: Limits = FEW) -> dict[str, Tensor]:
    folder = path.parent / "work"
    folder.mkdir()
    return load_file(convert(path, NAME, folder, limits))


def refused(path: Path, limits: Limits = FEW) -> str:
    """The message that a conversion fails with, without the part that is always there."""
    with pytest.raises(InvalidDelta, match="save the delta again as safetensors") as caught:
        converted(path, limits)
    assert caught.value.field == NAME
    message = str(caught.value)
    assert message.startswith(f"{NAME} ")
    assert message.isprintable()
    assert len(message) < 700
    return message.split("; save the delta")[0].removeprefix(f"{NAME} ")


def archive(path: Path, pickled: bytes, *data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file in torch's format around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", pickled)
        out.writestr("archive/version", "3\n")
        for index, record in enumerate(data):
            out.writestr(f"archive/data/{index}", record)
    return path


class Call:
    """Pickled, a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Storage:
    """Pickled, torch's reference to record 0 as ``numel`` floats."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class _Pickler(pickle._Pickler):
    def persistent_id(self, obj: object) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", obj.numel) if isinstance(obj, Storage) else None


def forged(path: Path, numel: int, size: tuple[int, ...], stride: tuple[int, ...], data: bytes) -> Path:
    """A tensor ``a`` with a storage, shape and strides that need not fit each other."""
    rebuilt = Call(torch._utils._rebuild_tensor_v2, Storage(numel), 0, size, stride, False, OrderedDict())
    pickled = path.with_suffix(".pkl")
    with pickled.open("wb") as out:
        _Pickler(out, 2).dump({"a": rebuilt})
    return archive(path, pickled.read_bytes(), data)
