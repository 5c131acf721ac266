"""What a prompt or a prefix delta costs at request time: the prefill of the request's own tokens, and no more.

    python -m benchmarks.prefix_cost [--virtual 100] [--prompt 128] [--rows 8] [--repeat 5] [--dtype bfloat16]

On SmolLM2-135M, through the engine's own runner: rows of the base, of a prompt delta and of a prefix delta with
``--virtual`` tokens (both after their first use), and, as the rival, rows of the base whose prompt is longer by as many
ordinary tokens, which is what a server does that prepends the embeddings to every request. Prints the tokens that
went through the backbone and the milliseconds until the first token of all rows, in rounds over the cases, best of each;
the ratios are of figures of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import backbone_folder, machine, make_delta


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--virtual", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch))


def run(args: argparse.Namespace, scratch: Path) -> None:
    import torch

    from server.engine import backbone as backbones
    from server.engine.kv import SlotKV
    from server.engine.runner import Runner

    torch.set_num_threads(args.threads)
    folder = backbone_folder(args.folder, scratch)
    device = torch.device(args.device)
    backbone = backbones.load("bench", Path(folder), device, getattr(torch, args.dtype))
    kv = SlotKV(backbone.spec, args.rows + 1, 1024, backbone.dtype, device)
    runner = Runner(backbone, kv, scratch_slot=args.rows)
    prompt, prefix = deltas(runner, args.virtual)
    longer = args.prompt + args.virtual
    cases = {
        "base": (args.prompt, None),
        f"prompt delta, {args.virtual} virtual tokens": (args.prompt, prompt),
        f"prefix delta, {args.virtual} virtual tokens": (args.prompt, prefix),
        f"base, {args.virtual} more tokens in the prompt": (longer, None),
    }
    best = dict.fromkeys(cases, float("inf"))
    tokens = dict.fromkeys(cases, 0)
    for turn in range(args.repeat + 1):
        for case, (length, delta) in cases.items():
            seconds, tokens[case] = first_tokens(runner, args.rows, length, delta)
            if turn:  # the first round warms up
                best[case] = min(best[case], seconds)
    print(f"{args.rows} rows, {args.dtype}, {args.threads} threads")
    for case in cases:
        ratio = best[case] / best["base"]
        print(f"{case:45} {tokens[case]:6} tokens computed  {1e3 * best[case]:8.1f} ms  {ratio:5.2f} of base")
    if args.json:
        results = {case: {"tokens_computed": tokens[case], "ms": 1e3 * best[case]} for case in cases}
        args.json.write_text(
            json.dumps({"machine": machine(), "dtype": args.dtype, "results": results}, indent=1)
        )


def deltas(runner: Any, n: int) -> tuple[Any, Any]:
    """A prompt delta, placed, and a prefix delta, of ``n`` virtual tokens."""
    from deltas import methods
    from deltas.pack import pack

    backbone = runner.backbone

    def placed(kind: str) -> Any:
        delta = make_delta(backbone.spec, kind, 1, virtual=n)
        packed = pack(methods.lower(delta, backbone.spec), backbone.spec, backbone.dtype)
        return runner.finish(packed.to(backbone.device))

    return placed("prompt"), placed("prefix")


def first_tokens(runner: Any, rows: int, length: int, delta: Any) -> tuple[float, int]:
    """Seconds until every row has its first token, and the tokens that went through the backbone."""
    from server.engine.plan import PlannedRow
    from server.engine.sequence import Sequence
    from server.types import DeltaRef, SamplingParams

    rng = random.Random(3)
    planned = []
    for slot in range(rows):
        prompt = [rng.randrange(3, 49000) for _ in range(length)]
        ref = None if delta is None else DeltaRef("bench", "")
        seq = Sequence(slot, "t", prompt, SamplingParams(max_tokens=1), delta=ref)
        seq.slot = slot
        seq.prefix = 0 if delta is None else delta.prefix_length
        planned.append(PlannedRow(seq, 0, length, True))
    began = time.perf_counter()
    for row in planned:
        if delta is not None and delta.prefix is not None:
            runner.kv.put_prefix(row.seq.slot, delta.prefix)
    runner.run(planned, [delta] * rows).logits.argmax(-1).tolist()
    return time.perf_counter() - began, sum(row.count for row in planned)


if __name__ == "__main__":
    main()
