"""What the embedded Valkey is told: its configuration file, and where its socket is."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

_SOCKET = "valkey.sock"
_LONGEST_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes


def configuration(folder: Path, socket: Path) -> bytes:
    """Valkey's configuration file."""
    lines = [
        b"port 0",
        b"unixsocket " + _quoted(socket),
        b"unixsocketperm 700",
        b"dir " + _quoted(folder),
        b"daemonize no",
        b'logfile ""',
        b'save ""',
        b"appendonly yes",
        b"appendfsync always",
        b"no-appendfsync-on-rewrite no",
        b"auto-aof-rewrite-min-size 16mb",
        b"maxmemory 0",
        b"maxmemory-policy noeviction",
    ]
    return b"\n".join(lines) + b"\n"


def _quoted(path: Path) -> bytes:
    """The path as one argument of a configuration line, whatever bytes it holds."""
    safe = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in os.fsencode(path))
    return f'"{"".join(safe)}"'.encode("ascii")


def socket_path(folder: Path) -> Path:
    """Where to listen: in the folder, or in a private temporary one when that path is too long for a socket.

    ``folder`` is absolute; the same one always gives the same path. Raises OSError when the temporary one is
    not safe to use.
    """
    path = folder / _SOCKET
    if _fits(path):
        return path
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    for parent in (tempfile.gettempdir(), "/tmp"):
        path = Path(parent).resolve() / f"deltaserve-{os.geteuid()}-{name}" / _SOCKET
        if _fits(path):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            status = path.parent.lstat()
            # A temporary folder is open to all users: what is there may have been put there by another one.
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise OSError(f"{path.parent} is not a private folder of this user: remove it")
            return path
    raise OSError(f"no path short enough for a socket: {folder} and the temporary folder are too long")


def _fits(path: Path) -> bool:
    """Whether the path can be a socket's, and be written in a URL."""
    raw = os.fsencode(path)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(raw) <= _LONGEST_SOCKET_PATH
