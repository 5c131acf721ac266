"""Framing of the messages between the api and the engine process, blocking side and asyncio side."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading

import msgspec

from server.engine.messages import HEADER_BYTES, MAX_FRAME_BYTES, Reply, Request

_LENGTH = struct.Struct("<I")


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


class EngineSide:
    """Blocking, for the engine process: one thread reads, any thread writes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")
        self._lock = threading.Lock()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Request).decode

    def send(self, reply: Reply) -> None:
        """Writes one frame whole. Raises ``OSError`` when the api process is gone."""
        frame = _frame(self._encode(reply))
        with self._lock:
            self._sock.sendall(frame)

    def receive(self) -> Request | None:
        """The next request; None once the api process has closed its end."""
        header = self._file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            return None
        length = _length(header)
        payload = self._file.read(length)
        return self._decode(payload) if len(payload) == length else None


class ApiSide:
    """Asyncio, for the api process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Reply).decode

    def send(self, request: Request) -> None:
        """Queues one frame; a dead engine shows at the next :meth:`receive`."""
        if not self._writer.is_closing():
            self._writer.write(_frame(self._encode(request)))

    async def receive(self) -> Reply | None:
        """The next reply; None once the engine process is gone."""
        try:
            length = _length(await self._reader.readexactly(HEADER_BYTES))
            reply: Reply = self._decode(await self._reader.readexactly(length))
            return reply
        except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
            return None  # a broken pipe: what it died of shows first in a send of ours

    async def close(self) -> None:
        """Closes our end; the engine process leaves when it sees that."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return
