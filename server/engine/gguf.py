"""GGUF files: the architecture from the first bytes, and help for a conversion that would otherwise take twice as long.

The format is ggml's (docs/gguf.md there): magic, version, two counts, then key-value pairs. Writers put
``general.architecture`` first; where one does not, the ``gguf`` package reads the whole header.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from server.errors import InvalidRequest

# What transformers converts whole. Of Gemma's files it leaves out how scores and positions are scaled; Mistral's say llama.
READ = ("gpt2", "llama", "qwen2", "qwen3")

_MAGIC = b"GGUF"
_KEY = "general.architecture"
_STRING = 8
_LONGEST = 1 << 16


def architecture(path: Path) -> str:
    """The ``model_type``-like name. Raises :class:`InvalidRequest` for a file that is no GGUF."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise InvalidRequest(f"{path.name} is not a GGUF file", param="backbone")
        file.seek(4 + 4 + 8 + 8)
        if _string(file) == _KEY and _number(file, "<I") == _STRING:
            return _string(file)
    from gguf import GGUFReader

    field = GGUFReader(str(path)).fields.get(_KEY)
    if field is None:
        raise InvalidRequest(f"{path.name} does not name its architecture", param="backbone")
    return str(field.contents())


@contextmanager
def name_maps_once() -> Iterator[None]:
    """While in the block, ``gguf`` makes each map of tensor names once: transformers asks again for every module."""
    import gguf

    original = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(original)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = original


def _number(file: BinaryIO, form: str) -> int:
    size = struct.calcsize(form)
    data = file.read(size)
    if len(data) < size:
        raise InvalidRequest("the GGUF file ends within its header", param="backbone")
    return int(struct.unpack(form, data)[0])


def _string(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    if length > _LONGEST:
        raise InvalidRequest("the GGUF file's header is damaged", param="backbone")
    return file.read(length).decode("utf-8", "replace")
