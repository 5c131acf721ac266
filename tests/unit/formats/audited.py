"""Run as a program: reads uploads with an audit hook armed, and prints what was opened, connected to or imported meanwhile.

    python -m tests.unit.formats.audited PICKLE FOLDER CANARY

``PICKLE`` holds a list of :class:`~tests.unit.formats.uploads.Upload`, the first of them harmless: reading it imports
everything that reading needs. At the end the program itself opens ``CANARY`` and resolves a name, which must be seen.
"""

from __future__ import annotations

import json
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from deltas.errors import DeltaError
from tests.unit.formats.uploads import BACKBONES, Upload

OWN = ("open", "os.", "shutil.", "tempfile.", "pathlib.", "glob.")
ALWAYS = (
    "socket.",
    "urllib.",
    "http.",
    "ftplib.",
    "subprocess.",
    "import",
    "exec",
    "compile",
    "pickle.",
    "ctypes.",
)


def watch(
    allowed: list[str], seen: list[str], armed: list[bool]
) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that notes every event outside the ``allowed`` folders, and all that are no business of a reader's."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if not armed[0]:
            return
        if event.startswith(ALWAYS):
            seen.append(f"{event} {arguments!r}"[:300])
        elif event.startswith(OWN):
            paths = [str(a) for a in arguments if isinstance(a, str | Path) and "/" in str(a)]
            outside = [path for path in paths if not any(path.startswith(folder) for folder in allowed)]
            if outside:
                seen.append(f"{event} {outside}"[:300])

    return hook


def main(packed: str, folder: str, canary: str) -> None:
    uploads: list[Upload] = pickle.loads(Path(packed).read_bytes())
    seen: list[str] = []
    armed = [False]
    sys.addaudithook(watch([folder, str(BACKBONES)], seen, armed))
    for upload in uploads[:1]:
        upload.read(Path(folder))
    accepted = 0
    armed[0] = True
    for upload in uploads:
        try:
            upload.read(Path(folder))
            accepted += 1
        except DeltaError:
            pass
    found = list(seen)
    Path(canary).read_bytes()
    try:
        socket.getaddrinfo("127.0.0.1", 1)
    finally:
        armed[0] = False
    print(json.dumps({"found": found, "control": seen[len(found) :], "accepted": accepted}))


if __name__ == "__main__":
    main(*sys.argv[1:])
