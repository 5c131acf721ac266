"""The benchmark scripts run, on a tiny backbone, and their results make a summary. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.curve import Curve, picture, round_step
from benchmarks.run_all import RUNS
from benchmarks.summary import write_summary
from tests.tiny import write_backbone

ROOT = Path(__file__).parents[3]
SMALL = ["--requests", "4", "--rows", "4", "--prompt", "5", "--new", "3", "--repeat", "1", "--threads", "1"]


def script(module: str, backbone: Path, result: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{module}", *SMALL, *arguments, "--dtype", "float32"]
    command += ["--folder", str(backbone), "--json", str(result)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_popularity_and_the_curve_on_a_tiny_backbone(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "tiny")
    script("popularity", backbone, tmp_path / "popularity.json")
    svg = tmp_path / "curve.svg"
    script("distinct_deltas", backbone, tmp_path / "distinct_deltas.json", "--most", "2", "--svg", str(svg))
    mixes = json.loads((tmp_path / "popularity.json").read_text())["results"]
    assert [len(group) for group in mixes.values()] == [1, 5, 5]
    assert list(json.loads((tmp_path / "distinct_deltas.json").read_text())["tokens_s"]) == ["0", "1", "2"]
    assert ET.parse(svg).getroot().tag.endswith("svg")
    written = write_summary(tmp_path, ["popularity", "distinct_deltas", "t5_mixed"])
    assert "| distinct deltas | tokens/s | to base | PEFT, tokens/s |" in written
    assert "No result: t5_mixed." in written


def test_the_summary_compares_with_the_aims(tmp_path: Path) -> None:
    results = {
        "ours base": {"tokens_s": 300.0, "peak_mb": 1000, "seconds": 1.0},
        "vllm base": {"tokens_s": 200.0, "peak_mb": 900, "seconds": 1.5},
    }
    (tmp_path / "mixed_decode_bfloat16.json").write_text(json.dumps({"machine": "m", "results": results}))
    written = write_summary(tmp_path)
    assert "| base only, to vLLM with no delta | 1.50 | 1.5 |" in written
    assert written.count("vLLM") == 1  # nothing is said of cases that did not run
    assert json.loads((tmp_path / "summary.json").read_text())["missing"] == []
    assert write_summary(tmp_path) == written  # the summary is not among its own sources


def test_every_script_that_bench_runs_is_there() -> None:
    assert all((ROOT / "benchmarks" / f"{module}.py").is_file() for module, _, _ in RUNS.values())


@pytest.mark.parametrize(("at_least", "step"), [(0.3, 0.5), (1, 1), (11, 20), (62, 100), (200, 200)])
def test_scales_have_round_steps(at_least: float, step: float) -> None:
    assert round_step(at_least) == pytest.approx(step)


def test_a_picture_escapes_its_words() -> None:
    drawn = picture([Curve("a<b", "black", {1: 5.0, 2: 4.0})], 6.0, "x & y", "machine")
    assert "a&lt;b" in drawn
    assert "x &amp; y" in drawn
    ET.fromstring(drawn)
