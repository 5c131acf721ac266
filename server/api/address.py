"""The address to listen on. Imports nothing heavy, so that a taken port is found at once."""

from __future__ import annotations

import socket


class PortInUseError(OSError):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """A listening address. Raises ``PortInUseError`` saying which."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PortInUseError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PortInUseError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return bound
