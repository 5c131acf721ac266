"""Every Triton kernel compiles for GPUs, down to their machine code, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.unit.ops.triton_compiled import CONSTANTS

ROOT = Path(__file__).resolve().parents[3]
WIDE_READS = (
    "_expand",
    "_rms_norm",
    "_silu_mul",
    "_attend",
)  # 16 bytes at a time: alignment has come through


def test_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.unit.ops.triton_compiled", "80", "90"]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(name, capability) for name, capability, *_ in lines] == [
        (name, capability)
        for capability in ("80", "90")
        for name, variants in CONSTANTS.items()
        for _ in variants
    ]
    first = {(name, capability): how for name, capability, how, _ in reversed(lines)}
    assert all(how == "v4" for (name, _), how in first.items() if name in WIDE_READS)
    assert all(int(size) > 0 for *_, size in lines)
