"""Framing of the messages between the api process and its children, blocking side and asyncio side."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from server.engine.messages import HEADER_BYTES, MAX_FRAME_BYTES

_LENGTH = struct.Struct("<I")

In = TypeVar("In")
Out = TypeVar("Out")


class WireError(ConnectionError):
    """The other side sent what is no frame of ours."""


def _frame(payload: bytes) -> bytes:
    if len(payload) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


def _length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a frame claims {length} bytes")
    return int(length)


class ChildSide(Generic[In, Out]):
    """Blocking, for a child: one thread reads messages of type ``incoming``, any thread writes."""

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")
        self._lock = threading.Lock()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(incoming).decode

    def send(self, message: Out) -> None:
        """Writes one frame whole. Raises ``OSError`` when the api process is gone."""
        frame = _frame(self._encode(message))
        with self._lock:
            self._sock.sendall(frame)

    def receive(self) -> In | None:
        """The next message; None once the api process has closed its end."""
        header = self._file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            return None
        length = _length(header)
        payload = self._file.read(length)
        if len(payload) < length:
            return None
        message: In = self._decode(payload)
        return message


class ParentSide(Generic[In, Out]):
    """Asyncio, for the api process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Any) -> None:
        self._reader, self._writer = reader, writer
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(incoming).decode

    def send(self, message: Out) -> None:
        """Queues one frame; a dead child shows at the next :meth:`receive`."""
        if not self._writer.is_closing():
            self._writer.write(_frame(self._encode(message)))

    async def receive(self) -> In | None:
        """The next message; None once the child is gone."""
        try:
            length = _length(await self._reader.readexactly(HEADER_BYTES))
            message: In = self._decode(await self._reader.readexactly(length))
            return message
        except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
            return None  # a broken pipe: what it died of shows first in a send of ours

    async def close(self) -> None:
        """Closes our end; the child leaves when it sees that."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return


async def start_child(
    module: str, arguments: Sequence[str], incoming: Any, descriptors: Sequence[int] = ()
) -> tuple[asyncio.subprocess.Process, ParentSide[Any, Any]]:
    """Runs ``python -m module FD ARGUMENTS``, FD being its end of a socket pair; it inherits ``descriptors`` too.

    ``incoming`` is the type of what it will send.
    """
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the folder we were started in is not a place to import from
            "-m",
            module,
            str(theirs.fileno()),
            *arguments,
            pass_fds=[theirs.fileno(), *descriptors],
            env=os.environ | {"PYTHONPATH": python_path()},
            stdin=asyncio.subprocess.DEVNULL,
        )
    finally:
        theirs.close()
    return process, ParentSide(*await asyncio.open_unix_connection(sock=ours), incoming)


def python_path() -> str:
    """The folder that holds the ``server`` package, for a child's ``PYTHONPATH``."""
    return str(Path(__file__).resolve().parents[2])
