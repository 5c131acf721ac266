"""Every benchmark that a CPU can show, one after another, and one summary of them: what ``make bench`` runs.

    python -m benchmarks.run_all [--quick] [--only NAME ...] [--out FOLDER] [--vllm-python PYTHON] [--llama-server BINARY]

Each script writes JSON to the folder (``build/bench`` by default); the curve's picture is ``distinct_deltas.svg``; the
summary is ``summary.json`` and ``summary.md``. ``--quick`` takes small sizes: it shows that everything runs, and its
figures say little. A script that fails does not end the others, and makes this command fail.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.summary import write_summary

# name of the result: module, arguments of a full run, arguments of a quick one
RUNS: dict[str, tuple[str, list[str], list[str]]] = {
    "mixed_decode_bfloat16": (
        "mixed_decode",
        ["--dtype", "bfloat16"],
        ["--dtype", "bfloat16", "--rows", "8", "--prompt", "16", "--new", "4", "--repeat", "1"],
    ),
    "mixed_decode_float32": (
        "mixed_decode",
        ["--dtype", "float32"],
        [
            "--dtype",
            "float32",
            "--rows",
            "8",
            "--prompt",
            "16",
            "--new",
            "4",
            "--repeat",
            "1",
            "--cases",
            "base",
        ],
    ),
    "popularity": ("popularity", [], ["--requests", "8", "--rows", "8", "--new", "4", "--repeat", "1"]),
    "distinct_deltas": (
        "distinct_deltas",
        ["--peft"],
        ["--most", "8", "--requests", "8", "--rows", "8", "--new", "4", "--repeat", "1"],
    ),
    "prefix_cost": ("prefix_cost", [], ["--rows", "2", "--repeat", "1"]),
    "encoder_mixed": ("encoder_mixed", [], ["--requests", "32", "--repeat", "1", "--cases", "ours", "plain"]),
    "t5_mixed": (
        "t5_mixed",
        [],
        ["--rows", "4", "--new", "4", "--repeat", "1", "--cases", "ours", "generate"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--vllm-python", default=None, help="see benchmarks/rivals/vllm_cpu.py")
    parser.add_argument("--llama-server", default=None, help="see benchmarks/rivals/llama_server.py")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        module, full, quick = RUNS[name]
        result = args.out / f"{name}.json"
        result.unlink(missing_ok=True)  # an earlier run's must not stand for this one's
        command = [sys.executable, "-m", f"benchmarks.{module}", *(quick if args.quick else full)]
        command += ["--json", str(result)]
        if module == "distinct_deltas":
            command += ["--svg", str(args.out / "distinct_deltas.svg")]
        if module == "mixed_decode":
            command += ["--vllm-python", args.vllm_python] if args.vllm_python else []
            command += ["--llama-server", args.llama_server] if args.llama_server else []
        print(f"== {name}: {' '.join(command[1:])}", flush=True)
        began = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
        if code:
            failed.append(name)
    print(write_summary(args.out, args.only, quick=args.quick))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
