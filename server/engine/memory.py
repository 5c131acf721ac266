"""How the engine and the tuner take memory: in huge pages; what one step frees the next takes again; weights they share.

A step's activations are tens of megabytes that are freed layer by layer. By glibc's defaults their pages go back to the
kernel each time and come back one fault after another, zeroed: a tenth of an encoder's step.
"""

from __future__ import annotations

import ctypes
import os

KEPT_BYTES = 256 << 20
"""Freed memory at the heap's end that is kept."""
LARGEST_KEPT_BYTES = 32 << 20
"""Larger blocks are mapped and given back one by one: the most that glibc takes here."""
SHARED_NAME = "deltaserve-weights"
"""By which the system lists a mapping of shared weights."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_pages() -> None:
    """Call before torch is imported: it reads its setting then. Only glibc's allocator has the others."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)


def create_shared() -> int:
    """A descriptor of new, empty shared memory for weights; it costs nothing until it is filled. ``os.close`` ends it."""
    return os.memfd_create(SHARED_NAME)
