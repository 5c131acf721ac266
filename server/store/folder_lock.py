"""Locks on a data folder: one server at a time, and no Valkey left over from an earlier one.

Locks are ``flock`` on small files, so the kernel frees them however a process ends. Nothing here trusts a
recorded process id: ids are reused, open descriptors are not.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from pathlib import Path

_GRACE_SECONDS = 0.1


def try_lock(path: Path) -> int | None:
    """Lock the file, made if it is missing: the descriptor that holds the lock, or None when it is taken.

    The lock is free after ``unlock``, or when every process that has a copy of the descriptor has ended.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unlock(descriptor: int) -> None:
    """Free the lock at once and close the descriptor.

    Closing alone would not do: another thread's child holds a copy between its fork and its exec.
    """
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def holders(path: Path) -> list[int]:
    """Ids of this user's other processes that hold a lock on the file. Empty where there is no ``/proc``."""
    wanted = path.stat()
    found = []
    for entry in _listing(Path("/proc")):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        for descriptor in _listing(Path("/proc", entry, "fd")):
            try:
                seen = os.stat(f"/proc/{entry}/fd/{descriptor}")
                same = (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino)
                # A process that merely has the file open (a backup, say) is none of our business.
                locked = same and b"FLOCK" in Path(f"/proc/{entry}/fdinfo/{descriptor}").read_bytes()
            except OSError:
                continue
            if locked:
                found.append(int(entry))
                break
    return found


async def lock_after_ending_holders(path: Path, patience: float) -> int | None:
    """Lock the file; who still holds it gets SIGTERM, and SIGKILL after half of ``patience`` seconds.

    Returns the descriptor, or None when the lock is not free after ``patience`` seconds.
    """
    started = time.monotonic()
    told: set[tuple[int, signal.Signals]] = set()
    while (descriptor := try_lock(path)) is None:
        spent = time.monotonic() - started
        if spent > patience:
            return None
        number = signal.SIGTERM if spent < patience / 2 else signal.SIGKILL
        # At first it may only be dying, or be a child of ours between its fork and its exec.
        for process in holders(path) if spent > _GRACE_SECONDS else []:
            if (process, number) not in told:
                told.add((process, number))
                _send(process, number)
        await asyncio.sleep(0.01)
    return descriptor


def _listing(folder: Path) -> list[str]:
    """Names in the folder; none when it is gone or not ours to read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _send(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return  # It ended by itself, which is what was wanted.
