"""The backbone's weights in memory that other processes of this server map: one copy for inference and tuning.

On a CPU the weights lie in one anonymous file in memory (``memfd_create(2)``) whose descriptor both children inherit
from the api process. The engine fills it once and computes from it; whoever maps it afterwards does so privately: a
stray write would copy its own page and change nobody else's. On CUDA the file holds handles of the engine's memory
instead. The file outlives the engine, so a restarted one finds the weights there.

Layout: eight bytes, little-endian, that say how long the header is (0 while the file is being filled); the header in
JSON; tensors, each group of ``deltas.groups`` side by side, so that q, k and v can be one product without a copy.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor
from transformers import AutoConfig

from deltas.backbones import describe
from deltas.groups import site_groups
from deltas.sites import BackboneSpec, SiteKind
from server.engine import backbone as backbones
from server.engine.backbone import Backbone
from server.engine.memory import SHARED_NAME

_LENGTH_BYTES = 8
_HEADER_BYTES = 4 << 20
_ALIGN_BYTES = 64


class SharedWeightsError(RuntimeError):
    """The shared memory holds no weights, or those of another backbone."""


def share(backbone: Backbone, fd: int) -> int:
    """Moves the backbone's weights into the memory ``fd``, where they stay; returns their bytes.

    If an earlier engine left the same weights there, they are used and nothing is written. Raises
    :class:`SharedWeightsError` if it left others: somebody may be computing with them.
    """
    header = _read(fd)
    if header is None and backbone.device.type == "cuda":
        _write_handles(backbone, fd)
        return 0
    if header is None:
        header = _write(backbone, fd)
    if header["backbone"] != _identity(backbone):
        raise SharedWeightsError(
            f"the files of {backbone.name} have changed while the server ran; restart the server to use them"
        )
    if backbone.device.type == "cpu":
        _place(backbone.model, header, _mapped(fd, private=False))
    return int(header["bytes"])


def load(fd: int) -> Backbone:
    """The backbone whose weights are in ``fd``, mapped privately: a model of its own around memory that is shared.

    Raises :class:`SharedWeightsError` where there are none yet.
    """
    header = _read(fd)
    if header is None:
        raise SharedWeightsError("no engine has put weights into the shared memory yet")
    folder = Path(header["folder"])
    dtype: torch.dtype = getattr(torch, header["dtype"])
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = backbones.empty(config, dtype)
    if header["handles"] is not None:
        _place_handles(model, bytes.fromhex(header["handles"]))
    else:
        _place(model, header, _mapped(fd, private=True))
    whole = describe(config, header["backbone"][1])
    return backbones.assemble(header["name"], folder, whole, model, torch.device(header["device"]), dtype)


def weight_bytes(fd: int) -> int:
    """Bytes of the weights in ``fd``; 0 before an engine put them there."""
    header = _read(fd)
    return 0 if header is None else int(header["bytes"])


def private_bytes() -> int:
    """How much of the weights this process has copied for itself by writing to them: see ``proc_pid_smaps(5)``."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split(maxsplit=1)[0]
        if not name.endswith(":"):  # a mapping's first line
            ours = SHARED_NAME in line
        elif ours and name == "Anonymous:":
            found += int(line.split()[1]) * 1024
    return found


def _identity(backbone: Backbone) -> list[str]:
    return [backbone.name, backbone.spec.revision, str(backbone.dtype), backbone.device.type]


def _write(backbone: Backbone, fd: int) -> dict[str, Any]:
    tensors = dict(_tensors(backbone.model))
    offsets: dict[int, int] = {}  # where the memory at this address went
    entries: dict[str, list[Any]] = {}
    at = 0
    for name, follows in _order(backbone.spec, tensors):
        tensor = tensors[name]
        if tensor.data_ptr() not in offsets or tensor.numel() == 0:
            at = at if follows else -(-at // _ALIGN_BYTES) * _ALIGN_BYTES
            offsets[tensor.data_ptr()] = at
            at += tensor.numel() * tensor.element_size()
        entries[name] = [str(tensor.dtype)[6:], list(tensor.shape), offsets[tensor.data_ptr()]]
    header = _header(backbone, at, entries, None)
    os.ftruncate(fd, _HEADER_BYTES + at)
    with mmap.mmap(fd, _HEADER_BYTES + at) as memory:
        for name, entry in entries.items():
            _tensor_at(memory, entry).copy_(
                tensors[name]
            )  # not named: the map closes when nobody looks into it
    _seal(fd, header)
    return header


def _write_handles(backbone: Backbone, fd: int) -> None:
    """CUDA: the engine's tensors stay where they are; the file says how to reach them."""
    reduced = {n: reduce_tensor(t) for n, t in _tensors(backbone.model)}  # type: ignore[no-untyped-call]
    handles = pickle.dumps(reduced).hex()
    os.ftruncate(fd, _HEADER_BYTES)
    _seal(fd, _header(backbone, 0, {}, handles))


def _header(
    backbone: Backbone, size: int, entries: dict[str, list[Any]], handles: str | None
) -> dict[str, Any]:
    return {
        "backbone": _identity(backbone),
        "name": backbone.name,
        "folder": str(backbone.folder),
        "dtype": str(backbone.dtype)[6:],
        "device": str(backbone.device),
        "bytes": size,
        "tensors": entries,
        "handles": handles,
    }


def _seal(fd: int, header: dict[str, Any]) -> None:
    """Last of all the header's length: a file that was left half filled is an empty one."""
    text = json.dumps(header).encode()
    if len(text) > _HEADER_BYTES - _LENGTH_BYTES:
        raise SharedWeightsError(f"a header of {len(text)} bytes: the backbone has too many tensors")
    os.pwrite(fd, text, _LENGTH_BYTES)
    os.pwrite(fd, len(text).to_bytes(_LENGTH_BYTES, "little"), 0)


def _read(fd: int) -> dict[str, Any] | None:
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    if length == 0:
        return None
    header: dict[str, Any] = json.loads(os.pread(fd, length, _LENGTH_BYTES))
    return header


def _mapped(fd: int, *, private: bool) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    return mmap.mmap(fd, os.fstat(fd).st_size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its names, detached."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer.detach()


def _order(spec: BackboneSpec, tensors: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Tensor names in the order in which they lie; does one follow its predecessor without a gap?"""
    left = dict.fromkeys(tensors)
    for group in site_groups(spec):
        if group.kind is not SiteKind.LINEAR:
            continue
        for parameter in ("weight", "bias"):
            names = [f"{site.path}.{parameter}" for site in group.sites]
            if all(name in left for name in names):
                for j, name in enumerate(names):
                    del left[name]
                    yield name, j > 0
    for name in left:
        yield name, False


def _place(model: nn.Module, header: dict[str, Any], memory: mmap.mmap) -> None:
    _assign(model, {name: _tensor_at(memory, entry) for name, entry in header["tensors"].items()})


def _tensor_at(memory: mmap.mmap, entry: list[Any]) -> Tensor:
    """The memory of one entry of the header (dtype, shape, offset) as a tensor."""
    dtype, shape, offset = getattr(torch, entry[0]), entry[1], entry[2]
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=_HEADER_BYTES + offset).view(shape)


def _place_handles(model: nn.Module, handles: bytes) -> None:
    # our own parent's engine wrote these bytes into memory that only this server's processes inherit
    reduced = pickle.loads(handles)  # noqa: S301
    _assign(model, {name: rebuild(*arguments) for name, (rebuild, arguments) in reduced.items()})


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts tensors in the place of the model's own; every one of them must have one. What is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for key, old in store.items():
                if old is None:
                    continue
                name = f"{path}.{key}" if path else key
                if name not in tensors:
                    raise SharedWeightsError(f"the shared memory lacks {name}")
                if store is module._buffers:
                    store[key] = tensors[name]
                    continue
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(tensors[name], requires_grad=False)
                store[key] = made[id(old)]
