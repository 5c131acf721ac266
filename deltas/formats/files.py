"""The files of one upload, by the names their library gave them. The only place that opens them."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.formats import pickled
from deltas.formats.header import MAX_NAME, Header, TensorInfo, parse_json, read_header, shown
from deltas.formats.pickled_child import ALIASES
from deltas.tensors import surely_finite

MAX_JSON_BYTES = 1 << 20


class DeltaFiles:
    """Name -> path of every file received. Names are compared with known ones and never used as paths."""

    def __init__(self, mapping: Mapping[str, Path]) -> None:
        self._paths = dict(mapping)
        self._converted: dict[str, Path] = {}
        self._headers: dict[str, Header] = {}
        self._objects: dict[str, dict[str, Any]] = {}
        self._joined: dict[str, tuple[str, ...]] = {}
        self._aliases: dict[str, dict[str, str]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._paths)

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of at most 1 MiB, parsed strictly. Raises :class:`InvalidDelta`."""
        if name not in self._objects:
            path = self._path(name)
            if path.stat().st_size > MAX_JSON_BYTES:
                raise InvalidDelta(f"{name} is larger than {MAX_JSON_BYTES} bytes", field=name)
            self._objects[name] = parse_json(path.read_bytes(), name)
        return self._objects[name]

    def header(self, name: str) -> Header:
        """Names, dtypes and shapes in a tensor file; reads its header only.

        A pickled file is converted first, which takes a process and seconds: see :mod:`deltas.formats.pickled`.
        Raises :class:`InvalidDelta` or, for a dtype that no delta has, :class:`UnsupportedDelta`.
        """
        if name not in self._headers:
            if name in self._joined:
                self._headers[name] = self._union(name)
            else:
                self._headers[name] = self._read_header(name)
        return self._headers[name]

    def join(self, names: Iterable[str]) -> str:
        """A name under which these tensor files can be read as one; a file alone keeps its own.

        Raises :class:`InvalidDelta` where two of them hold a tensor of one name.
        """
        parts = tuple(names)
        if len(parts) == 1:
            return parts[0]
        joined = " and ".join(parts)
        self._joined[joined] = parts
        self.header(joined)
        return joined

    def tensors(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors of a file whose header was checked, on the CPU, in memory of their own.

        float64 comes back as float32 where that is exact, and is refused where it is not; integers come back as
        int64, so that the same indices have the same digest. A NaN or an infinity anywhere is refused, naming the tensor.
        """
        header = self.header(name)
        loaded: dict[str, Tensor] = {}
        if name in self._joined:
            every = list(keys)
            for part in self._joined[name]:
                there = self.header(part).tensors
                loaded |= self.tensors(part, [key for key in every if key in there])
            return loaded
        aliases, wanted = self._aliases.get(name, {}), list(keys)
        if any(key in aliases for key in wanted):
            _check_claims(name, header, wanted, aliases)
        try:
            with safe_open(str(self._safetensors(name)), framework="pt", device="cpu") as file:
                for key in wanted:
                    # A clone, since the file may go away and its pages with it.
                    loaded[key] = file.get_tensor(aliases.get(key, key)).clone()
        except SafetensorError as error:
            raise InvalidDelta(f"{name} is not a valid safetensors file: {error}", field=name) from None
        sure = surely_finite(tensor for tensor in loaded.values() if tensor.is_floating_point())
        for key, tensor in loaded.items():
            info = header.tensors[key]
            if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                raise InvalidDelta(f"{shown(key)} is not what the header says", field=key)
            if not sure and not bool(torch.isfinite(tensor).all()):
                raise InvalidDelta(f"{shown(key)} holds NaN or an infinity", field=key)
            if tensor.dtype == torch.float64:
                loaded[key] = _narrowed(key, tensor)
            elif not tensor.is_floating_point():
                loaded[key] = tensor.to(torch.int64)
        return loaded

    def _read_header(self, name: str) -> Header:
        """The file's own header, with the further names that a pickled file had for some tensors."""
        header = read_header(self._safetensors(name), name)
        text = header.metadata.get(ALIASES) if name.endswith(pickled.SUFFIXES) else None
        if text is None:
            return header
        aliases = parse_json(text.encode(), name)
        for alias, original in aliases.items():
            known = isinstance(original, str) and original in header.tensors and alias not in header.tensors
            if not known or not 0 < len(alias) <= MAX_NAME or not alias.isprintable():
                raise InvalidDelta(f"{name}: {shown(alias)} is no second name of a tensor", field=name)
        self._aliases[name] = aliases
        return Header(
            {**header.tensors, **{a: header.tensors[o] for a, o in aliases.items()}}, header.metadata
        )

    def _union(self, name: str) -> Header:
        tensors: dict[str, TensorInfo] = {}
        for part in self._joined[name]:
            own = self.header(part).tensors
            twice = tensors.keys() & own.keys()
            if twice:
                raise InvalidDelta(f"{name} both hold {shown(min(twice))}", field=min(twice))
            tensors |= own
        return Header(tensors, {})

    def _safetensors(self, name: str) -> Path:
        """The file itself, or the safetensors file made of a pickled one; that lives as long as this object."""
        path = self._path(name)
        if not name.endswith(pickled.SUFFIXES):
            return path
        if name not in self._converted:
            folder = Path(mkdtemp(prefix="converted-", dir=path.parent))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._converted[name] = pickled.convert(path, name, folder)
        return self._converted[name]

    def _path(self, name: str) -> Path:
        if name not in self._paths:
            raise InvalidDelta(f"{name} is missing; received: {listed(self.names)}", field=name)
        return self._paths[name]


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message, quoted, at most ``limit`` of them."""
    every = list(names)
    text = ", ".join(shown(name) for name in every[:limit])
    return text if len(every) <= limit else f"{text} and {len(every) - limit} more"


def _check_claims(name: str, header: Header, wanted: Iterable[str], aliases: Mapping[str, str]) -> None:
    """What is read at once may not be more than the file has, however many names a tensor has."""

    def claimed(keys: Iterable[str]) -> int:
        infos = (header.tensors[key] for key in keys)
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)

    if claimed(wanted) > claimed(key for key in header.tensors if key not in aliases):
        raise InvalidDelta(f"{name} has tensors that together claim more bytes than there are", field=name)


def _narrowed(key: str, tensor: Tensor) -> Tensor:
    narrow = tensor.to(torch.float32)
    if not torch.equal(narrow.to(torch.float64), tensor):
        raise InvalidDelta(f"{shown(key)} is float64 and not exact in float32", field=key)
    return narrow
