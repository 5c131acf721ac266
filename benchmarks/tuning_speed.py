"""LoRA jobs on SmolLM2 beside PEFT and a plain loop: time and peak memory of a step, of one job and of four at once.

    python -m benchmarks.tuning_speed --folder FOLDER [--dtype bfloat16] [--rows 8] [--length 128] [--small 1]
        [--steps 5] [--threads 1] [--time cpu] [--json FILE]

The work of a step is ``--rows`` rows of ``--length`` tokens, all of them predicted, rank 8 on all linears of the layers,
AdamW. Four jobs have ``--small`` rows a step each, together in one pass or one after another. Every case is a process of
its own, so that its peak is its own (from when the weights are loaded on); cases take turns, step by step, since the
machine may be shared, and a case's figure is the median of its steps. ``--time cpu`` counts the processor's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import machine

RANK = 8
JOBS = 4
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="the backbone, in Hugging Face's layout")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--small", type=int, default=1, help="rows a step of each of four jobs")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--cases", default="peft,ours,peft-small,one,apart,together")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        serve(args)
        return
    cases = args.cases.split(",")
    workers = {case: Worker(case) for case in cases}
    times: dict[str, list[float]] = {case: [] for case in cases}
    for worker in workers.values():
        worker.ask("step")  # warm
    for _ in range(args.steps):
        for case, worker in workers.items():
            times[case].append(float(worker.ask("step")))
    found = {}
    for case, worker in workers.items():
        peak, resident = (int(part) for part in worker.ask("peak").split())
        found[case] = {"seconds": statistics.median(times[case]), "peak": peak, "loaded": resident}
        print(
            f"{case:12} {found[case]['seconds']:7.3f} s   peak {peak / 1e6:6.0f} MB, of which loaded {resident / 1e6:5.0f}"
        )
        worker.close()
    if {"ours", "peft"} <= found.keys():
        print(f"a step against PEFT's: {found['ours']['seconds'] / found['peft']['seconds']:.2f}")
    if {"together", "apart"} <= found.keys():
        print(
            f"{JOBS} together, of one after another: {found['together']['seconds'] / found['apart']['seconds']:.2f}"
        )
    if {"together", "peft-small"} <= found.keys():
        print(
            f"memory of {JOBS}, of {JOBS} loops: {found['together']['peak'] / JOBS / found['peft-small']['peak']:.2f}"
        )
    if {"together", "one"} <= found.keys():
        print(
            f"memory of {JOBS}, of {JOBS} tuners: {found['together']['peak'] / JOBS / found['one']['peak']:.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "cases": found, "argv": sys.argv[1:]}))


class Worker:
    """A case in a process of its own."""

    def __init__(self, case: str) -> None:
        command = [sys.executable, "-m", "benchmarks.tuning_speed", *sys.argv[1:], "--case", case]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self._read() != "READY\n":
            pass

    def _read(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            sys.exit(f"a case ended: {self._child.wait()}")
        return line

    def ask(self, what: str) -> str:
        """Its answer to ``step`` (seconds) or ``peak`` (bytes: at the most, and before the first step)."""
        assert self._child.stdin is not None
        print(what, file=self._child.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._child.communicate()


def serve(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.time == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as scratch:
        step = peft_loop(args) if args.case.startswith("peft") else jobs(args, Path(scratch))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        loaded = status("VmRSS")
        print("READY", flush=True)
        for line in sys.stdin:
            if line.strip() == "step":
                began = clock()
                step()
                print(clock() - began, flush=True)
            else:
                print(status("VmHWM"), loaded, flush=True)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def rows_of(args: argparse.Namespace, job: int) -> list[list[int]]:
    import torch

    count = args.rows if args.case in ("ours", "peft") else args.small
    make = torch.Generator().manual_seed(job)
    found: list[list[int]] = torch.randint(10, 40_000, (count, args.length), generator=make).tolist()
    return found


def peft_loop(args: argparse.Namespace) -> Callable[[], None]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ids = torch.tensor(rows_of(args, 0))

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def jobs(args: argparse.Namespace, scratch: Path) -> Callable[[], None]:
    import msgspec
    import torch

    from deltas.tuned import tunable
    from server.engine import backbone as backbones
    from server.tuning.forward import Passes
    from server.tuning.run import Run
    from server.tuning.spec import Example, JobSpec, MethodSpec
    from server.tuning.trainer import Trainer

    device = torch.device("cpu")
    passes = Passes(backbones.load("backbone", Path(args.folder), device, getattr(torch, args.dtype)))
    spec, lora = passes.backbone.spec, tunable("lora")
    methods = [
        MethodSpec(
            method="lora",
            options=lora.options({"rank": RANK}, spec),
            targets=[site.name for site in lora.sites(None, spec)],
        )
    ]
    trainers = [Trainer(passes)]
    for job in range(JOBS if args.case in ("together", "apart") else 1):
        folder = scratch / str(job)
        folder.mkdir()
        rows = [Example(tokens, learn=[(1, len(tokens))]) for tokens in rows_of(args, job)]
        (folder / "train.msgpack").write_bytes(msgspec.msgpack.encode(rows))
        settings: dict[str, Any] = {
            "batch_size": len(rows),
            "epochs": 1000,
            "checkpoint_every": 10_000,
            "learning_rate": RATE,
        }
        run = Run.open(
            JobSpec(id=str(job), tenant="t", name="n", task="generate", methods=methods, **settings),
            folder,
            passes,
        )
        if args.case == "apart" and job:
            trainers.append(Trainer(passes))
        trainers[-1].add(run)

    def step() -> None:
        for trainer in trainers:
            trainer.step()

    return step


if __name__ == "__main__":
    main()
