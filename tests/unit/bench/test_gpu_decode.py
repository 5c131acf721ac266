"""The GPU benchmark, on a small shape on the CPU: every case runs and is told; without a device it ends with one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_decode", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_small_shape_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = run("--tiny", "--device", "cpu", "--json", str(path))
    assert done.returncode == 0, done.stderr
    told = json.loads(path.read_text())
    cases = [(line["case"], line["rows"]) for line in told["lines"]]
    assert cases == [
        ("base alone", 4),
        ("base alone", 8),
        ("4 deltas of four kinds", 4),
        ("8 deltas of four kinds", 8),
        ("PEFT adapter_names, 4 LoRAs", 4),
    ]
    assert all(
        line["ms"] > 0 and line["tokens_per_second"] > 0 and line["of_bound"] > 0 for line in told["lines"]
    )
    assert [line["of_base"] for line in told["lines"][:2]] == [1.0, 1.0]
    assert told["card"] in done.stdout
    assert all(case in done.stdout for case, _ in cases)


def test_without_a_device() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "gpu_decode: torch finds no CUDA device here; nothing was measured"
    ]
