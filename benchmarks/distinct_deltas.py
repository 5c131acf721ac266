"""Throughput against the number of distinct deltas, 1 to 512, in one engine process; as a table and as a picture.

    python -m benchmarks.distinct_deltas [--dtype bfloat16] [--requests 512] [--rows 32] [--new 16] [--svg FILE]

Every point is the same requests (greedy, all new tokens forced) through the real engine loop without HTTP; request i uses
delta i modulo the number of deltas. All deltas (rank-8 LoRAs on all linears, or ``--kinds`` in turn) are resident at every
point, so that points differ only in how many of them are asked for. At most ``--rows`` rows run at a time, which bounds how
many deltas one step can mix, too. Points take turns in rounds, forwards and backwards, and the best of each is kept; the
dashed line is the backbone without a delta. A delta's file is deleted once it is resident, so the disk holds one at a time;
in memory 512 LoRAs of SmolLM2-135M are 2.5 GB in bfloat16, 5 GB in float32.

The rival is PEFT's mixed batch (``adapter_names``), one batch of ``--rows`` requests of the same lengths, in a process of
its own after ours; without ``--peft`` it is left out. It is measured up to 32 adapters: adding more takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOM, RunningEngine, backbone_folder, machine, make_delta
from benchmarks.curve import Curve, picture

COUNTS = (1, 2, 8, 32, 128, 512)
PEFT_COUNTS = (1, 8, 32)


def prompts(args: argparse.Namespace, vocabulary: int, count: int) -> list[list[int]]:
    chance = random.Random(1)
    return [chance.choices(range(3, vocabulary), k=args.prompt) for _ in range(count)]


def measure(args: argparse.Namespace, folder: str, scratch: Path) -> dict[int, float]:
    """Tokens per second by the number of distinct deltas; 0 is the backbone alone."""
    from server.engine.process import EngineConfig

    config = EngineConfig(
        backbone=folder, backbone_name=None, data_dir=str(scratch), device=args.device, dtype=args.dtype,
        max_model_len=args.prompt + args.new + ROOM, max_rows=args.rows, max_waiting=args.requests, prefill_tokens=512,
        kv_bytes=None, delta_bytes=args.delta_gib << 30, host_delta_bytes=1 << 30, threads=args.threads,
    )  # fmt: skip
    running = RunningEngine(config)
    try:
        spec = running.engine.runner.backbone.spec
        counts = [count for count in COUNTS if count <= args.most]
        refs: list[Any] = []
        for seed in range(
            max(counts)
        ):  # one at a time: they need not all be on disk, or in this process twice
            refs += running.load([make_delta(spec, args.kinds[seed % len(args.kinds)], seed)], scratch)
            running.replies.clear()
            Path(refs[-1].path).unlink()
        resident = running.engine.residency.count_on_device
        if resident < len(refs):
            raise SystemExit(
                f"only {resident} of {len(refs)} deltas fit --delta-gib {args.delta_gib}: raise it"
            )
        asked = prompts(args, spec.vocab, args.requests)
        running.serve([(asked[0], refs[0])], args.new, "first")  # the first pass pays for what is made once
        best = dict.fromkeys([0, *counts], 0.0)
        for turn in range(args.repeat):
            for count in best if turn % 2 == 0 else reversed(best):
                requests = [(prompt, refs[i % count] if count else None) for i, prompt in enumerate(asked)]
                seconds = running.serve(requests, args.new, f"{turn}.{count}")
                best[count] = max(best[count], args.requests * args.new / seconds)
                print(f"  {count} deltas: {best[count]:.0f} tokens/s", flush=True)
        return best
    finally:
        running.close()


def peft(args: argparse.Namespace, folder: str) -> dict[int, float]:
    """The rival's tokens per second by the number of distinct LoRAs."""
    config = json.loads((Path(folder) / "config.json").read_text())
    figures = {}
    for count in (count for count in PEFT_COUNTS if count <= min(args.most, args.rows)):
        asked = {name: getattr(args, name) for name in ("dtype", "device", "new", "repeat", "threads")}
        asked |= {"folder": folder, "what": f"{count} loras"}
        asked |= {"prompts": prompts(args, config["vocab_size"], args.rows)}
        command = [sys.executable, "-m", "benchmarks.rivals.hugging_face", json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"PEFT with {count} LoRAs failed:\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.rpartition("RESULT ")[2])
        figures[count] = args.rows * args.new / result["seconds"]
        print(f"  PEFT, {count} LoRAs: {figures[count]:.0f} tokens/s", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="no point beyond so many deltas")
    parser.add_argument("--kinds", nargs="+", default=["lora"])
    parser.add_argument("--peft", action="store_true", help="measure PEFT's mixed batch, too")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--delta-gib", type=int, default=6, help="memory for resident deltas")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--svg", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = backbone_folder(args.folder, Path(scratch))
        figures = measure(args, folder, Path(scratch))
        rival = peft(args, folder) if args.peft else {}
    kinds = "LoRAs of rank 8" if args.kinds == ["lora"] else ", ".join(args.kinds)
    title = f"{args.requests} requests of {args.prompt} + {args.new} tokens, {args.rows} rows; {kinds}; {args.dtype}"
    print(
        f"\n{machine()}; {args.threads} threads; {title}\n{'deltas':>8} {'tokens/s':>9} {'to base':>8} {'PEFT':>8}"
    )
    for count, value in figures.items():
        other = f"{rival[count]:8.0f}" if count in rival else ""
        print(f"{count:8} {value:9.0f} {value / figures[0]:8.2f} {other}")
    if args.json:
        written = {"machine": machine(), "title": title, "tokens_s": figures, "peft_tokens_s": rival}
        args.json.write_text(json.dumps(written, indent=1))
    if args.svg:
        base = figures.pop(0)
        curves = [Curve("deltaserve", "#1f5fa8", figures)]
        if rival:
            curves.append(Curve("PEFT, adapter_names", "#c2571a", rival))
        args.svg.write_text(picture(curves, base, title, machine()))


if __name__ == "__main__":
    main()
