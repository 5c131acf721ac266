"""One pickled tensor file, read and written again as safetensors, in a process that is then thrown away.

A script, started by :mod:`deltas.formats.pickled` as ``python -I``: it imports nothing of this package, and
sees no environment, no input and no open files. Even ``weights_only=True`` is not trusted to keep a hostile
file from harming the process that loads it, hence the limits that are set first. Linux has all of them.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

READY = "ready"
REFUSED = 3
ALIASES = "aliases"
"""The key of the written file's metadata whose value is a JSON object: name -> name of the tensor that it also is."""

_ZIP = b"PK\x03\x04"
# The number that files of torch before 1.6 begin with, pickled. Its yet older tar files are not read.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_PICKLE = 64 << 20  # bytes, without the tensors' data
_OTHER_MEMBERS = 16  # of a zip: the pickle and torch's own marks
_OPEN_FILES = 64
_SLACK = 16 << 20  # bytes beside tensor data in what is written: a header, warnings
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_METADATA = "__metadata__"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}


class Refused(Exception):
    """The file is not a flat dict of plain tensors; the message completes 'the file ...'."""


@dataclass(frozen=True)
class Job:
    """What to do, and how much of everything it may take."""

    source: str
    target: str
    parent: int  # process id
    memory: int  # bytes of address space, beside twice the file's size
    cpu_seconds: int
    max_tensors: int
    max_name: int  # characters


def main(job: Job) -> None:
    """Convert. Exits with ``REFUSED`` and a message on the standard output for a file that cannot be."""
    die_with(job.parent)
    size = os.stat(job.source).st_size
    restrain(job, size)
    print(READY, flush=True)  # whatever goes wrong from here on is the file's doing
    try:
        tensors = checked(load(job, size), job)
        write(*fitting(tensors, size), Path(job.target))
    except Refused as error:
        print(error)
        sys.exit(REFUSED)


def die_with(parent: int) -> None:
    """End, by SIGKILL, when the parent does."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            sys.exit("cannot arm the parent-death signal")
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            sys.exit("cannot give up privileges")
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def restrain(job: Job, size: int) -> None:
    """Set every limit, hard, on top of what importing torch took."""
    torch.set_num_threads(1)
    used = sum(os.times()[:2])
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: math.ceil(used) + job.cpu_seconds,
        resource.RLIMIT_FSIZE: size + _SLACK,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: 0,  # no threads and no processes, unless run by root
    }
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + 2 * size + job.memory
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A second between the soft and the hard limit on CPU time lets SIGXCPU say why.
        last = capped + 1 if kind == resource.RLIMIT_CPU and capped == value != hard else capped
        resource.setrlimit(kind, (capped, last))


def load(job: Job, size: int) -> object:
    """What the file holds; tensors of a zip file stay in the mapped file. Raises :class:`Refused`, or dies."""
    with open(job.source, "rb") as file:
        start = file.read(len(_LEGACY))
    zipped = start.startswith(_ZIP)
    if zipped:
        check_zip(job.source, size, job.max_tensors)
    elif start != _LEGACY:
        raise Refused("is not a file that torch.save wrote")
    try:
        return torch.load(job.source, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found:
            raise Refused(f"refers to {_shown(found[1])}, which is not part of a plain tensor") from None
        raise
    except MemoryError:
        raise Refused("asks for more memory than its size explains") from None


def check_zip(source: str, size: int, max_tensors: int) -> None:
    """Refuse an archive that unpacks to more than itself. torch writes its members as they are."""
    with zipfile.ZipFile(source) as archive:
        members = archive.infolist()
    if len(members) > max_tensors + _OTHER_MEMBERS:
        raise Refused(f"has {len(members)} members, the limit is {max_tensors} tensors")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Refused("is compressed, which torch.save never does")
    if sum(max(member.file_size, member.compress_size) for member in members) > size:
        raise Refused("has members that claim more bytes than there are")
    if any(member.filename.endswith("data.pkl") and member.file_size > _MAX_PICKLE for member in members):
        raise Refused(f"has a pickle of more than {_MAX_PICKLE} bytes beside its tensors")


def checked(loaded: object, job: Job) -> dict[str, Tensor]:
    """The tensors by name, if that is all there is. Nothing is copied."""
    if type(loaded) not in (dict, OrderedDict) or not isinstance(loaded, Mapping):
        raise Refused(f"holds a {type(loaded).__name__}, not a dict of tensors")
    if len(loaded) > job.max_tensors:
        raise Refused(f"has {len(loaded)} tensors, the limit is {job.max_tensors}")
    for name, value in loaded.items():
        if type(name) is not str:
            raise Refused(f"has a key of type {type(name).__name__}, not a tensor's name")
        if not 0 < len(name) <= job.max_name or not name.isprintable() or name == _METADATA:
            raise Refused(
                f"names a tensor {_shown(name)}; names have 1 to {job.max_name} printable characters"
            )
        nbytes(name, value)
    return dict(loaded)


def fitting(tensors: Mapping[str, Tensor], size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that together have as many bytes as the file, and where needed further names of some of them.

    A state dict can have one tensor under many names: AdapterHub's prefixes are in it once per attention.
    """
    if sum(nbytes(name, tensor) for name, tensor in tensors.items()) <= size:
        return dict(tensors), {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if first.setdefault(place, name) == name:
            kept[name] = tensor
        else:
            aliases[name] = first[place]
    if sum(nbytes(name, tensor) for name, tensor in kept.items()) > size:
        raise Refused("has tensors that together claim more bytes than there are")
    return kept, aliases


def nbytes(name: str, value: object) -> int:
    """Bytes of one value, once written. Raises :class:`Refused` unless it is a dense tensor of a known dtype."""
    if type(value) not in (Tensor, torch.nn.Parameter) or not isinstance(value, Tensor):
        _refuse(name, f"is of type {type(value).__name__}, not a tensor; the dict must be flat")
    if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
        _refuse(name, "is not a dense tensor")
    if value.is_quantized or value.dtype not in _DTYPES:
        _refuse(name, f"has dtype {value.dtype}; accepted: {', '.join(_DTYPES.values())}")
    if value.is_neg():
        _refuse(name, "is a lazily negated tensor")
    claimed = math.prod(value.shape) * value.dtype.itemsize
    if claimed > value.untyped_storage().nbytes():
        _refuse(name, "repeats its elements, and would grow when written")
    return claimed


def write(tensors: Mapping[str, Tensor], aliases: Mapping[str, str], target: Path) -> None:
    """A safetensors file, tensor by tensor, in the dict's order, with further names of some in its metadata."""
    header: dict[str, Any] = {_METADATA: {ALIASES: json.dumps(aliases)}} if aliases else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data)


def _refuse(name: str, problem: str) -> NoReturn:
    raise Refused(f"has a value {_shown(name)} that {problem}")


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
