"""Compiles the C kernels on the machine they run on, once, into the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = (
    "kernels.c",
    "kernels_storage.c",
    "kernels_patch.c",
    "kernels_sparse.c",
    "kernels_linear.c",
    "kernels_rows.c",
    "kernels_attention.c",
    "kernels_ragged.c",
)
COMPILERS = ("gcc", "cc", "clang")  # gcc first: it speaks the ABI of the OpenMP runtime that torch brings
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
)
# First without an OpenMP runtime of its own: torch has loaded one for all to see, and a second pool of
# threads would fight it for the cores. With one where torch's does not fit (another system or compiler).
LINKS: tuple[tuple[str, ...], ...] = (("-shared",), ("-shared", "-fopenmp"))


class BuildFailed(Exception):
    """Why there is no library; the message is for the log."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/deltaserve``, by default ``~/.cache/deltaserve``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deltaserve"


def library(cache: Path) -> ctypes.CDLL:
    """Loads the library from the cache folder, building it there when it is missing.

    Raises BuildFailed where there is no compiler, it fails, or the folder cannot be written.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildFailed(f"no compiler found ({', '.join(COMPILERS)})")
    folder = Path(__file__).parent
    name = f"kernels-{_fingerprint(folder, compiler)}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (cache / name).exists():
            _build(folder, compiler, cache / name)
        return ctypes.CDLL(str(cache / name))
    except OSError as error:
        raise BuildFailed(f"{cache}: {error}") from error


def _fingerprint(folder: Path, compiler: str) -> str:
    """sha256 of everything the library depends on: sources, flags, the CPU's features, the compiler."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((folder / source).read_bytes())
    parts = [
        *FLAGS,
        *(flag for link in LINKS for flag in link),
        _cpu(),
        _run([compiler, "--version"]),
    ]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()


def _cpu() -> str:
    """The CPU's features: a library compiled for another CPU may die of an illegal instruction."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = next(
        (line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor()
    )
    return f"{platform.machine()} {features}"


def _build(folder: Path, compiler: str, target: Path) -> None:
    """Compiles, links and checks the library in a folder of its own, then moves it to ``target`` atomically.

    Two processes that build at once both succeed: the second move replaces the first by the same.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled = str(Path(scratch, "kernels.o"))
        _run([compiler, *FLAGS, "-c", str(folder / "kernels.c"), "-o", compiled])
        reasons: list[str] = []
        for link in LINKS:
            linked = Path(scratch, f"kernels{len(reasons)}.so")
            try:
                _run([compiler, *link, compiled, "-o", str(linked), "-lm"])
                ctypes.CDLL(str(linked), mode=os.RTLD_NOW)  # an unresolved OpenMP symbol shows here
            except (BuildFailed, OSError) as error:
                reasons.append(str(error))
                continue
            linked.replace(target)
            return
        raise BuildFailed("; ".join(reasons))


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildFailed(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
