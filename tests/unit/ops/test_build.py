"""The kernels' library: built once, by whoever comes first, and a reason where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltas.ops import build, native


def test_build_is_cached_and_safe_with_others_at_work(kernels: native.Kernels, tmp_path: Path) -> None:
    script = "from deltas.ops import native; assert native.load() is not None"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    (built,) = (tmp_path / "deltaserve").iterdir()
    stamp = built.stat().st_mtime_ns
    build.library(tmp_path / "deltaserve")
    assert built.stat().st_mtime_ns == stamp


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildFailed, match="no compiler"):
        build.library(tmp_path)
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\nif [ $1 = --version ]; then exit 0; fi\necho out of order >&2; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(build.BuildFailed, match="out of order"):
        build.library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
