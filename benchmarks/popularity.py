"""How requests are spread over deltas: does it matter? 32 deltas, five popularities, the same requests otherwise.

    python -m benchmarks.popularity [--dtype bfloat16] [--requests 64] [--rows 32] [--json FILE]

Popularities are those of ``deltaserve bench``: distinct (in turn), uniform, zipf (chance 1/k), identical (all for the
first), skewed (half for the first). Each is measured over 32 LoRAs (rank 8, all linears) and over 32 deltas of ``--kinds``
in turn, all resident, through the real engine loop without HTTP; ``base`` is the same requests with no delta. Prompts are
random tokens, the same in every case; new tokens are greedy and forced. Cases take turns in rounds, forwards and
backwards, and the best of each is kept. A group's spread is how far its slowest popularity is below its fastest. Among
mixed kinds a popularity also changes how much work there is, since kinds differ: ``identical`` is one kind on all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import ROOM, RunningEngine, backbone_folder, machine, make_delta, percent_apart
from server.bench.plan import POPULARITIES, choices

DELTAS = 32


def measure(args: argparse.Namespace, folder: str, scratch: Path) -> dict[str, dict[str, float]]:
    """Tokens per second by group of deltas and by popularity."""
    from server.engine.process import EngineConfig

    config = EngineConfig(
        backbone=folder, backbone_name=None, data_dir=str(scratch), device=args.device, dtype=args.dtype,
        max_model_len=args.prompt + args.new + ROOM, max_rows=args.rows, max_waiting=args.requests, prefill_tokens=512,
        kv_bytes=None, delta_bytes=2 << 30, host_delta_bytes=1 << 30, threads=args.threads,
    )  # fmt: skip
    running = RunningEngine(config)
    try:
        spec = running.engine.runner.backbone.spec
        groups = {"32 LoRAs": ["lora"], f"32 deltas of {', '.join(args.kinds)}": args.kinds}
        refs = {
            group: running.load(
                [make_delta(spec, kinds[i % len(kinds)], 100 * n + i) for i in range(DELTAS)], scratch
            )
            for n, (group, kinds) in enumerate(groups.items())
        }
        chance = random.Random(1)
        prompts = [chance.choices(range(3, spec.vocab), k=args.prompt) for _ in range(args.requests)]
        cases: dict[tuple[str, str], list[Any]] = {("no delta", "base"): [None] * args.requests}
        for group, deltas in refs.items():
            for popularity in POPULARITIES:
                chosen = islice(choices(popularity, DELTAS, 1.0, random.Random(2)), args.requests)
                cases[group, popularity] = [deltas[place] for place in chosen]
        figures: dict[str, dict[str, float]] = {}
        for turn in range(args.repeat + 1):
            for n, case in enumerate(cases if turn % 2 else reversed(cases)):
                requests = list(zip(prompts, cases[case], strict=True))
                seconds = running.serve(requests, args.new, f"{turn}.{n}")
                if turn:  # the first round warms up
                    found = figures.setdefault(case[0], {})
                    found[case[1]] = max(found.get(case[1], 0.0), args.requests * args.new / seconds)
        return figures
    finally:
        running.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="rows that run at a time, at most")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=["lora", "bottleneck", "bitfit", "prompt"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(args, backbone_folder(args.folder, Path(scratch)), Path(scratch))
    base = figures["no delta"]["base"]
    print(f"\n{machine()}; {args.dtype}; {args.threads} threads; {args.requests} requests, prompt {args.prompt}, "
          f"{args.new} new tokens, {args.rows} rows")  # fmt: skip
    spreads = {}
    for group, found in figures.items():
        spreads[group] = percent_apart(list(found.values()))
        print(f"{group}" + ("" if group == "no delta" else f": {spreads[group]:.1f} % apart"))
        for popularity, value in found.items():
            print(f"  {popularity:12} {value:7.0f} tokens/s {value / base:6.2f} of base")
    if args.json:
        written = {"machine": machine(), "dtype": args.dtype, "results": figures, "percent_apart": spreads}
        args.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
